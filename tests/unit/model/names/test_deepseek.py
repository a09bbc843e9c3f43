"""The naming table of DeepSeek checkpoints, as data: no row contradicts itself or another."""

from __future__ import annotations

import pytest

from kimi_convert.checkpoints.mapping import Storage, holes
from kimi_convert.model.names import deepseek, kimi_linear

ROWS = [
    pytest.param(row, id=f"{table.__name__.rpartition('.')[2]}-{row.param}")
    for table in (deepseek, kimi_linear)
    for row in table.NAMES
]


@pytest.mark.parametrize("row", ROWS)
def test_both_names_of_a_tensor_have_the_same_holes(row):
    for name in (row.checkpoint, *row.aliases):
        assert holes(name) == holes(row.param) <= {"layer", "expert"}


@pytest.mark.parametrize("row", ROWS)
def test_every_tensor_has_a_shape(row):
    assert row.shape


@pytest.mark.parametrize("table", [deepseek, kimi_linear])
def test_every_drop_has_a_reason(table):
    assert all(drop.why for drop in table.DROPS)


def test_nothing_of_the_sources_has_a_dtype_of_its_own():
    assert {row.storage for row in deepseek.NAMES} == {Storage.WEIGHT}


# model.layers.61 of DeepSeek-V3: README_WEIGHTS.md of github.com/deepseek-ai/DeepSeek-V3.
def test_mtp_layer_has_tensors_of_its_own_and_those_of_a_decoder_layer():
    prefix = "model.layers.{layer}."
    mtp = {drop.checkpoint for drop in deepseek.DROPS if drop.where == "mtp"}
    assert {
        prefix + "embed_tokens.weight",
        prefix + "enorm.weight",
        prefix + "hnorm.weight",
        prefix + "eh_proj.weight",
        prefix + "shared_head.norm.weight",
        prefix + "shared_head.head.weight",
        prefix + "input_layernorm.weight",
        prefix + "self_attn.kv_b_proj.weight",
        prefix + "mlp.experts.{expert}.up_proj.weight",
    } < mtp
    assert all("layer" in holes(name) for name in mtp)
