from __future__ import annotations

import torch

from kimi_convert.model.cache import new_cache
from kimi_convert.model.loading import load_model
from kimi_convert.validation.page.memory import memory_by_context
from tests.tiny import tiny_config, write_tiny_checkpoint


@torch.inference_mode()
def test_bytes_are_those_that_a_model_keeps(tmp_path):
    config = tiny_config("kimi_linear")
    folder = write_tiny_checkpoint(tmp_path / "c", config)
    cache = new_cache(config, 1, dtype=torch.float32)
    load_model(folder)(torch.zeros(1, 256, dtype=torch.int64), cache)
    point = memory_by_context(config)[0]
    assert point.tokens == 256
    assert point.states + point.cache == cache.nbytes


def test_states_do_not_grow():
    points = memory_by_context(tiny_config("kimi_linear"))
    assert {point.states for point in points} == {points[0].states}
    assert points[-1].all_mla == 4 * points[-1].cache
