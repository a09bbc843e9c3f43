from __future__ import annotations

import pytest
import torch

from kimi_convert.model.kda import KdaForm
from kimi_convert.model.loading import load_model
from kimi_convert.validation.parity.compare import compare_traces
from kimi_convert.validation.parity.stages import EMBED_PROBE, LOGITS_PROBE, STAGES, Probe
from kimi_convert.validation.parity.torch_model import (
    TorchRun,
    continue_greedily,
    single_tokens,
    trace_checkpoint,
    uneven_pieces,
)
from tests.tiny import tiny_config, write_tiny_checkpoint

CONFIG = tiny_config("kimi_linear", q_lora_rank=20)
TOKENS = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("t") / "c", CONFIG, seed=2)


@pytest.fixture(scope="module")
def reference(checkpoint):
    return trace_checkpoint(checkpoint, TOKENS, TorchRun())


@torch.inference_mode()
def test_layer_by_layer_gives_the_whole_models_logits(checkpoint, reference):
    assert torch.equal(reference.logits, load_model(checkpoint)(TOKENS))


def test_every_stage_is_heard(reference):
    assert {probe.stage for probe in reference.values} == {stage.name for stage in STAGES}
    batch = {values.shape[0] for values in reference.values.values()}
    assert batch == {2}


@pytest.mark.parametrize("pieces", [uneven_pieces, single_tokens])
def test_pieces_hear_the_same_stages(checkpoint, reference, pieces):
    run = TorchRun(kda_form=KdaForm.RECURRENT, pieces=pieces)
    found = trace_checkpoint(checkpoint, TOKENS, run)
    assert found.values.keys() == reference.values.keys()
    assert compare_traces(found, reference, dtype=torch.float32, config=CONFIG).passed


def test_narrow_dtype_follows_the_references_near_ties(checkpoint, reference):
    run = TorchRun(dtype=torch.bfloat16)
    alone = trace_checkpoint(checkpoint, TOKENS, run)
    led = trace_checkpoint(checkpoint, TOKENS, run, follow=reference)
    assert alone.rerouted == 0
    assert led.rerouted > 0
    assert compare_traces(led, reference, dtype=torch.bfloat16, config=CONFIG).left_out == 0


def test_teacher_is_traced_too(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "teacher", tiny_config("deepseek_v3"), seed=2)
    found = trace_checkpoint(folder, TOKENS, TorchRun())
    assert {EMBED_PROBE, Probe(3, "mla.attention"), LOGITS_PROBE} <= found.values.keys()


def test_continuation_is_the_largest_logit_of_a_prefill(checkpoint):
    prompt = TOKENS[0, :5].tolist()
    found = continue_greedily(checkpoint, prompt, 4, TorchRun())
    text = torch.tensor([prompt + found.ids.tolist()])
    with torch.inference_mode():
        expected = load_model(checkpoint)(text)[0, 4:-1]
    assert torch.equal(found.ids, expected.argmax(-1))
    assert torch.allclose(found.logits, expected, atol=1e-4)
