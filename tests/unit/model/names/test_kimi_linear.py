"""The naming table of Kimi-Linear against the names of the released checkpoint."""

from __future__ import annotations

from kimi_convert.checkpoints.mapping import Storage
from kimi_convert.model.names import deepseek, kimi_linear
from kimi_convert.model.names.layout import expected_entries
from tests.tiny import tiny_config

CONFIG = tiny_config("kimi_linear", num_experts=3)
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
KDA = (
    *(f"self_attn.{part}_proj.weight" for part in ("q", "k", "v")),
    *(f"self_attn.{part}_conv1d.weight" for part in ("q", "k", "v")),
    "self_attn.A_log",
    "self_attn.dt_bias",
    *(f"self_attn.{part}_proj.weight" for part in ("f_a", "f_b", "b", "g_a", "g_b")),
    "self_attn.o_norm.weight",
    "self_attn.o_proj.weight",
)
MLA = (
    "self_attn.q_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
    "self_attn.kv_a_layernorm.weight",
    "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight",
)
DENSE = tuple(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
MOE = (
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.gate.e_score_correction_bias",
    *(
        f"block_sparse_moe.experts.{i}.{part}.weight"
        for part in ("w1", "w3", "w2")
        for i in range(3)
    ),
    *(f"block_sparse_moe.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")),
)


def names_of(layer_idx):
    prefix = f"model.layers.{layer_idx}."
    entries = [entry for entry in expected_entries(CONFIG) if entry.layer_idx == layer_idx]
    assert all(entry.name.startswith(prefix) for entry in entries)
    return sorted(entry.name.removeprefix(prefix) for entry in entries)


def by_param(config=CONFIG):
    return {entry.param: entry for entry in expected_entries(config)}


def test_dense_kda_layer_has_the_released_names():
    assert names_of(0) == sorted(NORMS + KDA + DENSE)


def test_sparse_kda_layer_has_the_released_names():
    assert names_of(1) == sorted(NORMS + KDA + MOE)


def test_mla_layer_has_the_released_names():
    assert names_of(3) == sorted(NORMS + MLA + MOE)


def test_experts_are_named_by_their_role():
    entries = by_param()
    prefix = "model.layers.1.block_sparse_moe.experts.2."
    names = {
        part: entries[f"layers.1.moe.experts.2.{part}.weight"].name
        for part in ("gate", "up", "down")
    }
    assert names == {
        "gate": prefix + "w1.weight",
        "up": prefix + "w3.weight",
        "down": prefix + "w2.weight",
    }


def test_decay_is_stored_in_fp32_and_nothing_else_is():
    fp32 = {row.param for row in kimi_linear.NAMES if row.storage is Storage.FP32}
    assert fp32 == {"layers.{layer}.kda.A_log", "layers.{layer}.kda.dt_bias"}


def test_shapes_of_kda():
    shapes = {
        param.removeprefix("layers.0.kda."): entry.shape
        for param, entry in by_param().items()
        if param.startswith("layers.0.kda.")
    }
    wide, conv = (64, 32), (64, 1, 4)
    assert shapes == {
        **dict.fromkeys(("q.weight", "k.weight", "v.weight"), wide),
        **dict.fromkeys(("q_conv.weight", "k_conv.weight", "v_conv.weight"), conv),
        "A_log": (1, 1, 4, 1),
        "dt_bias": (64,),
        "f_a.weight": (16, 32),
        "f_b.weight": (64, 16),
        "b.weight": (4, 32),
        "g_a.weight": (16, 32),
        "g_b.weight": (64, 16),
        "o_norm.weight": (16,),
        "o.weight": (32, 64),
    }


def test_correction_bias_is_there_whatever_the_routing():
    config = tiny_config("kimi_linear", topk_method="greedy")
    assert "layers.1.moe.router.bias" in by_param(config)


def test_spelling_of_transformers_is_an_alias_of_the_dense_layer_alone():
    aliases = {entry.name: entry.aliases for entry in expected_entries(CONFIG) if entry.aliases}
    assert aliases == {
        f"model.layers.0.mlp.{part}_proj.weight": (
            f"model.layers.0.block_sparse_moe.{part}_proj.weight",
        )
        for part in ("gate", "up", "down")
    }


def test_everything_but_kda_has_the_parameters_of_the_sources():
    own = {row.param for row in kimi_linear.NAMES} - {row.param for row in deepseek.NAMES}
    assert all(param.startswith("layers.{layer}.kda.") for param in own)
    assert {row.param for row in deepseek.NAMES} < {row.param for row in kimi_linear.NAMES}
