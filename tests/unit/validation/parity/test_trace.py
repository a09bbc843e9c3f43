from __future__ import annotations

import torch

from kimi_convert.validation.parity.stages import LOGITS_PROBE, Probe, in_order
from kimi_convert.validation.parity.trace import Greedy, Trace, load_trace, save_trace


def test_file_gives_back_what_was_saved(tmp_path):
    shared = torch.randn(2, 3, 4)
    values = {Probe(0, "kda.q"): shared, Probe(0, "hidden"): shared, LOGITS_PROBE: shared[..., :2]}
    greedy = Greedy(torch.tensor([3, 1]), torch.randn(2, 5))
    save_trace(Trace(values, greedy), tmp_path / "trace")
    found = load_trace(tmp_path / "trace")
    assert found.values.keys() == values.keys()
    assert all(torch.equal(found.values[probe], values[probe]) for probe in values)
    assert torch.equal(found.greedy.ids, greedy.ids)
    assert torch.equal(found.greedy.logits, greedy.logits)


def test_probes_come_in_the_order_of_a_run():
    probes = [LOGITS_PROBE, Probe(1, "hidden"), Probe(1, "kda.q"), Probe(0, "hidden")]
    assert in_order(probes) == [Probe(0, "hidden"), Probe(1, "kda.q"), *probes[1::-1]]
    assert [probe.name for probe in in_order(probes)][-2:] == ["layers.1.hidden", "logits"]
