"""One pass over the source's bytes, before anything is fitted to them."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.config.progress import ignore_progress
from kimi_convert.conversion.plan import plan_conversion
from kimi_convert.conversion.source_values import check_source_values
from kimi_convert.errors import CheckpointError
from tests.integration.broken import change_tensors
from tests.tiny import tiny_config, write_tiny_checkpoint

LAST = "model.norm.weight"


@pytest.fixture
def source(tmp_path):
    return write_tiny_checkpoint(tmp_path / "source", tiny_config("deepseek_v3"))


def test_finite_values_pass_and_every_byte_is_told(source):
    plan = plan_conversion(source)
    events = []
    check_source_values(plan, events.append)
    assert events[0].done == 0
    assert events[-1].done == events[-1].total == plan.read_bytes
    assert sorted(event.detail for event in events[:-1]) == sorted(plan.index.tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_that_is_not_finite_is_refused_by_name(source, value, dtype):
    def spoil(tensors):
        tensors[LAST] = tensors[LAST].to(dtype)
        tensors[LAST][-1] = value

    change_tensors(source, spoil)
    with pytest.raises(CheckpointError, match="not finite") as caught:
        check_source_values(plan_conversion(source), ignore_progress)
    assert repr(LAST) in caught.value.message
    assert caught.value.where == str(source)


def test_tensor_that_is_left_out_is_not_read(source, monkeypatch):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(source, lambda tensors: tensors.update({name: torch.full((4,), math.nan)}))
    read = []
    real = CheckpointReader.chunks
    monkeypatch.setattr(
        CheckpointReader, "chunks", lambda self, name: read.append(name) or real(self, name)
    )
    check_source_values(plan_conversion(source), ignore_progress)
    assert LAST in read
    assert name not in read
