"""What a checkpoint must and may hold, by its config."""

from __future__ import annotations

import pytest

from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.errors import CheckpointError
from kimi_convert.model.names.layout import expected_entries, layout_of, match_checkpoint
from tests.tiny import tiny_config

KINDS = ("deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_linear")
ROTARY = "rotary frequencies are recomputed from config.json"
MTP = "multi-token-prediction layers have no place in the target format"
every_kind = pytest.mark.parametrize("kind", KINDS)


def as_stored(name, dtype, shape):
    return TensorSpec(name, dtype, shape, "model.safetensors", 0, 0)


def stored_of(config):
    return [as_stored(entry.name, "BF16", entry.shape) for entry in expected_entries(config)]


def matched(config, *more):
    stored = [*stored_of(config), *(as_stored(name, "BF16", (1,)) for name in more)]
    return match_checkpoint(config, stored, where="folder")


def params(config):
    return {entry.param: entry for entry in expected_entries(config)}


@every_kind
def test_tensors_come_in_the_order_in_which_a_model_runs(kind):
    entries = expected_entries(tiny_config(kind))
    assert [entry.param for entry in (entries[0], *entries[-2:])] == [
        "embed.weight",
        "norm.weight",
        "head.weight",
    ]
    layers = [entry.layer_idx for entry in entries[1:-2]]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1, 2, 3}


@every_kind
def test_whole_checkpoint_matches(kind):
    config = tiny_config(kind)
    found = matched(config)
    assert found.entries == expected_entries(config)
    assert found.dropped == ()


@every_kind
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F8_E4M3"])
def test_plain_weights_alone_are_read(kind, dtype):
    config = tiny_config(kind)
    first, *others = stored_of(config)
    stored = [as_stored(first.name, dtype, first.shape), *others]
    if dtype == "F8_E4M3":
        with pytest.raises(CheckpointError, match="not a plain weight"):
            match_checkpoint(config, stored, where="folder")
    else:
        assert match_checkpoint(config, stored, where="folder")


@every_kind
def test_rotary_frequencies_of_any_layer_are_dropped(kind):
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    dropped = matched(tiny_config(kind), *names).dropped
    assert {one.name: one.why for one in dropped} == dict.fromkeys(names, ROTARY)


MTP_NAMES = (
    "embed_tokens.weight",
    "enorm.weight",
    "hnorm.weight",
    "eh_proj.weight",
    "shared_head.norm.weight",
    "shared_head.head.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_a_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
)
MOE_PREFIX = dict.fromkeys(KINDS, "mlp") | {"kimi_linear": "block_sparse_moe"}
EXPERT = dict.fromkeys(KINDS, "gate_proj") | {"kimi_linear": "w1"}


def mtp_names(kind, layer_idx):
    moe = MOE_PREFIX[kind]
    own = (f"{moe}.gate.weight", f"{moe}.experts.7.{EXPERT[kind]}.weight")
    kda = ("self_attn.A_log",) if kind == "kimi_linear" else ()
    return [f"model.layers.{layer_idx}.{name}" for name in (*MTP_NAMES, *own, *kda)]


@every_kind
@pytest.mark.parametrize("num_mtp_layers", [1, 2])
def test_mtp_layers_follow_the_last_layer_and_are_dropped(kind, num_mtp_layers):
    config = tiny_config(kind, num_nextn_predict_layers=num_mtp_layers)
    names = [name for i in range(num_mtp_layers) for name in mtp_names(kind, 4 + i)]
    rotary = "model.layers.4.self_attn.rotary_emb.inv_freq"
    dropped = {one.name: one.why for one in matched(config, *names, rotary).dropped}
    assert dropped == dict.fromkeys(names, MTP) | {rotary: ROTARY}


@every_kind
@pytest.mark.parametrize("num_mtp_layers", [0, 1])
def test_layer_that_the_config_does_not_know_is_refused(kind, num_mtp_layers):
    config = tiny_config(kind, num_nextn_predict_layers=num_mtp_layers)
    for name in mtp_names(kind, 4 + num_mtp_layers):
        with pytest.raises(CheckpointError) as caught:
            matched(config, name)
        assert caught.value.found == f"1 unknown: {name!r}"


@every_kind
def test_mtp_layers_need_not_be_there(kind):
    assert matched(tiny_config(kind, num_nextn_predict_layers=1)).dropped == ()


@every_kind
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.embed_tokens.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq.weight",
        "language_model.model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.self_attn.kv_b_proj.weight_scale_inv",
    ],
)
def test_other_tensors_are_refused(kind, name):
    with pytest.raises(CheckpointError, match="1 unknown"):
        matched(tiny_config(kind, num_nextn_predict_layers=1), name)


def test_dense_layer_under_both_spellings_is_refused_with_both():
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.block_sparse_moe.up_proj.weight"]
    with pytest.raises(CheckpointError, match="under two names") as caught:
        matched(tiny_config("kimi_linear"), names[1])
    assert all(name in caught.value.found for name in names)


@every_kind
def test_query_is_one_matrix_or_two(kind):
    full, low = params(tiny_config(kind)), params(tiny_config(kind, q_lora_rank=6))
    assert full["layers.3.mla.q.weight"].shape == (4 * 24, 32)
    assert "layers.3.mla.q_a.weight" not in full
    assert "layers.3.mla.q.weight" not in low
    assert low["layers.3.mla.q_a.weight"].shape == (6, 32)
    assert low["layers.3.mla.q_a_norm.weight"].shape == (6,)
    assert low["layers.3.mla.q_b.weight"].shape == (4 * 24, 6)


@every_kind
def test_shapes_of_mla_and_the_rest(kind):
    entries = params(tiny_config(kind, vocab_size=96))
    shapes = {
        "embed.weight": (96, 32),
        "norm.weight": (32,),
        "head.weight": (96, 32),
        "layers.3.input_norm.weight": (32,),
        "layers.3.mlp_norm.weight": (32,),
        "layers.3.mla.kv_a.weight": (12 + 8, 32),
        "layers.3.mla.kv_a_norm.weight": (12,),
        "layers.3.mla.kv_b.weight": (4 * 32, 12),
        "layers.3.mla.o.weight": (32, 4 * 16),
        "layers.0.mlp.gate.weight": (48, 32),
        "layers.0.mlp.down.weight": (32, 48),
        "layers.3.moe.router.weight": (8, 32),
        "layers.3.moe.experts.7.up.weight": (24, 32),
        "layers.3.moe.experts.7.down.weight": (32, 24),
        "layers.3.moe.shared.gate.weight": (24, 32),
        "layers.3.moe.shared.down.weight": (32, 24),
    }
    assert {param: entries[param].shape for param in shapes} == shapes


@pytest.mark.parametrize(
    ("kind", "field"), [("deepseek_v3", "n_shared_experts"), ("kimi_linear", "num_shared_experts")]
)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_shared_experts_are_one_wide_expert_or_none(kind, field, count):
    shared = params(tiny_config(kind, **{field: count})).get("layers.3.moe.shared.up.weight")
    assert (shared.shape if shared else None) == ((24 * count, 32) if count else None)


@pytest.mark.parametrize("method", ["noaux_tc", "greedy"])
def test_sources_have_a_correction_bias_only_with_noaux_tc(method):
    entries = params(tiny_config("deepseek_v3", topk_method=method))
    assert ("layers.3.moe.router.bias" in entries) == (method == "noaux_tc")


@every_kind
def test_tied_model_has_no_head(kind):
    config = tiny_config(kind, tie_word_embeddings=True)
    assert "head.weight" not in params(config)
    with pytest.raises(CheckpointError, match="unknown"):
        matched(config, "lm_head.weight")


@pytest.mark.parametrize(
    ("kind", "field"), [("deepseek_v2", "n_routed_experts"), ("kimi_linear", "num_experts")]
)
def test_model_without_experts_is_dense_throughout(kind, field):
    config = tiny_config(kind, **{field: None})
    assert layout_of(config).layers["dense"] == (0, 1, 2, 3)
    assert all(entry.expert_idx is None for entry in expected_entries(config))
    assert matched(config)


@every_kind
def test_layer_sets_divide_the_layers(kind):
    sets = layout_of(tiny_config(kind, num_nextn_predict_layers=1)).layers
    for one, other in (("kda", "mla"), ("dense", "moe"), ("moe_bias", "moe_unbiased")):
        whole = "moe" if one == "moe_bias" else "all"
        assert sorted((*sets[one], *sets[other])) == sorted(sets[whole])
    assert sets["all_and_mtp"] == (*sets["all"], *sets["mtp"]) == (0, 1, 2, 3, 4)
    assert sorted((*sets["mla_full_q"], *sets["mla_low_rank_q"])) == sorted(sets["mla"])
