"""Config dataclasses: what cannot be a model is refused, and what follows from the sizes."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from kimi_convert.config.architecture import (
    KdaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    TopkMethod,
    YarnConfig,
)
from kimi_convert.config.limits import (
    MAX_CONV_SIZE,
    MAX_EXPERTS_IN_ALL,
    MAX_HEADS,
    MAX_INTEGER,
    MAX_LAYERS,
    MAX_WIDTH,
)
from kimi_convert.errors import ConfigError

YARN = YarnConfig(factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707)
ROPE = RopeConfig(theta=10000.0)
MLA = MlaConfig(
    num_heads=4,
    q_lora_rank=None,
    kv_lora_rank=12,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    rope=ROPE,
)
KDA = KdaConfig(num_heads=4, head_dim=16)
MOE = MoeConfig(
    num_experts=8,
    num_experts_per_token=3,
    num_shared_experts=1,
    intermediate_size=24,
    first_dense_layers=1,
)
MODEL = ModelConfig(
    model_type="deepseek_v3",
    hidden_size=32,
    num_layers=4,
    vocab_size=96,
    intermediate_size=48,
    rms_norm_eps=1e-5,
    max_positions=4096,
    mla=MLA,
)
NAN, INF = math.nan, math.inf


def bounds(config, field, name, least, most):
    return [
        pytest.param(config, {field: least - 1}, name, id=f"{field}-below"),
        pytest.param(config, {field: most + 1}, name, id=f"{field}-above"),
        pytest.param(config, {field: 10**30}, name, id=f"{field}-far-above"),
    ]


def not_within(config, field, name, *values):
    return [
        pytest.param(config, {field: value}, name, id=f"{field}-{value}")
        for value in (*values, NAN, INF, -INF)
    ]


REFUSED = [
    *bounds(YARN, "original_max_positions", "original_max_position_embeddings", 1, MAX_INTEGER),
    *not_within(YARN, "factor", "rope_scaling.factor", 0.99, 0, -1, 2e6),
    *not_within(YARN, "beta_slow", "rope_scaling.beta_slow", 0, -1, 2e6),
    *not_within(YARN, "beta_fast", "rope_scaling.beta_fast", 0.5, -1, 2e6),
    *not_within(YARN, "mscale", "rope_scaling.mscale", -0.1, 2e3),
    *not_within(YARN, "mscale_all_dim", "rope_scaling.mscale_all_dim", -0.1, 2e3),
    *not_within(ROPE, "theta", "rope_theta", 1, 0, -5, 1e13),
    *bounds(MLA, "num_heads", "num_attention_heads", 1, MAX_HEADS),
    *bounds(MLA, "q_lora_rank", "q_lora_rank", 1, MAX_WIDTH),
    *bounds(MLA, "kv_lora_rank", "kv_lora_rank", 1, MAX_WIDTH),
    *bounds(MLA, "qk_nope_head_dim", "qk_nope_head_dim", 1, MAX_WIDTH),
    *bounds(MLA, "v_head_dim", "v_head_dim", 1, MAX_WIDTH),
    *bounds(MLA, "qk_rope_head_dim", "qk_rope_head_dim", 0, MAX_WIDTH),
    pytest.param(MLA, {"qk_rope_head_dim": 7}, "qk_rope_head_dim", id="odd-rope"),
    *bounds(KDA, "num_heads", "linear_attn_config.num_heads", 1, MAX_HEADS),
    *bounds(KDA, "head_dim", "linear_attn_config.head_dim", 1, MAX_WIDTH),
    *bounds(KDA, "conv_size", "linear_attn_config.short_conv_kernel_size", 1, MAX_CONV_SIZE),
    *bounds(MOE, "num_experts", "n_routed_experts", 1, MAX_EXPERTS_IN_ALL),
    *bounds(MOE, "intermediate_size", "moe_intermediate_size", 1, MAX_WIDTH),
    *bounds(MOE, "num_shared_experts", "n_shared_experts", 0, MAX_WIDTH),
    *bounds(MOE, "first_dense_layers", "first_k_dense_replace", 0, MAX_LAYERS),
    *bounds(MOE, "layer_freq", "moe_layer_freq", 1, MAX_LAYERS),
    *bounds(MOE, "num_experts_per_token", "num_experts_per_tok", 1, 8),
    *bounds(MOE, "num_groups", "n_group", 1, 8),
    *bounds(MOE, "topk_groups", "topk_group", 1, 1),
    *not_within(MOE, "routed_scaling_factor", "routed_scaling_factor", 0, -1, 2e6),
    pytest.param(MOE, {"num_groups": 3}, "n_group", id="groups-that-do-not-divide"),
    pytest.param(
        MOE, {"num_groups": 4, "topk_groups": 1}, "num_experts_per_tok", id="groups-too-small"
    ),
    *bounds(MODEL, "hidden_size", "hidden_size", 1, MAX_WIDTH),
    *bounds(MODEL, "vocab_size", "vocab_size", 1, MAX_WIDTH),
    *bounds(MODEL, "intermediate_size", "intermediate_size", 1, MAX_WIDTH),
    *bounds(MODEL, "num_layers", "num_hidden_layers", 1, MAX_LAYERS),
    *bounds(MODEL, "num_mtp_layers", "num_nextn_predict_layers", 0, MAX_LAYERS),
    *bounds(MODEL, "max_positions", "max_position_embeddings", 1, MAX_INTEGER),
    *not_within(MODEL, "rms_norm_eps", "rms_norm_eps", 0, -1e-6, 1.1),
    *not_within(MODEL, "initializer_range", "initializer_range", -0.1, 2e3),
    pytest.param(MODEL, {"dtype": "int8"}, "dtype", id="dtype"),
    pytest.param(MODEL, {"dtype": "__class__"}, "dtype", id="hostile-dtype"),
    pytest.param(MODEL, {"kda": KDA}, "linear_attn_config", id="sizes-without-layers"),
    pytest.param(MODEL, {"kda_layers": (0,)}, "linear_attn_config", id="layers-without-sizes"),
    pytest.param(MODEL, {"kda": KDA, "kda_layers": (1, 0)}, "kda_layers", id="unordered"),
    pytest.param(MODEL, {"kda": KDA, "kda_layers": (0, 0)}, "kda_layers", id="twice"),
    pytest.param(MODEL, {"kda": KDA, "kda_layers": (4,)}, "kda_layers", id="one-based"),
    pytest.param(MODEL, {"kda": KDA, "kda_layers": (-1,)}, "kda_layers", id="negative"),
]


@pytest.mark.parametrize(("config", "changes", "name"), REFUSED)
def test_what_cannot_be_a_model_is_refused_by_the_name_of_the_field(config, changes, name):
    with pytest.raises(ConfigError) as caught:
        replace(config, **changes)
    words = caught.value.message.replace("'", " ").split()
    assert any(name in (word, word.rpartition(".")[2]) for word in words)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        pytest.param(YARN, {"factor": 1.0}, id="factor-of-one"),
        pytest.param(YARN, {"beta_fast": 1.0, "beta_slow": 1.0}, id="kimi-k2-ramp"),
        pytest.param(YARN, {"mscale": 0.0, "mscale_all_dim": 0.0}, id="no-magnitude"),
        pytest.param(MLA, {"qk_rope_head_dim": 0}, id="nothing-rotates"),
        pytest.param(MLA, {"q_lora_rank": 1}, id="latent-of-one"),
        pytest.param(MLA, {"num_heads": MAX_HEADS, "v_head_dim": MAX_WIDTH}, id="widest-mla"),
        pytest.param(KDA, {"conv_size": 1}, id="one-tap"),
        pytest.param(MOE, {"num_experts": 3}, id="all-experts-chosen"),
        pytest.param(MOE, {"num_shared_experts": 0}, id="nothing-shared"),
        pytest.param(MOE, {"num_groups": 8, "topk_groups": 3}, id="groups-of-one"),
        pytest.param(MODEL, {"num_layers": MAX_LAYERS}, id="most-layers"),
        pytest.param(MODEL, {"kda": KDA, "kda_layers": (0, 1, 2, 3)}, id="all-kda"),
        pytest.param(MODEL, {"rms_norm_eps": 1.0}, id="largest-eps"),
        pytest.param(MODEL, {"initializer_range": 0.0}, id="no-spread"),
    ],
)
def test_extreme_models_are_models(config, changes):
    changed = replace(config, **changes)
    assert {name: getattr(changed, name) for name in changes} == changes


def test_experts_of_all_layers_together_are_bounded():
    moe = replace(MOE, num_experts=MAX_EXPERTS_IN_ALL // 4)
    full = replace(MODEL, moe=moe)
    with pytest.raises(ConfigError, match=r"'n_routed_experts'.*65536 in each of 5 layers"):
        replace(full, num_mtp_layers=1)


def test_configs_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        MODEL.num_layers = 5


# m = 0.1 mscale ln(factor) + 1, as DeepSeek's modeling_deepseek.py has it.
@pytest.mark.parametrize(
    ("yarn", "softmax", "rotation"),
    [
        pytest.param(YARN, (0.0707 * math.log(40) + 1) ** 2, 1.0, id="deepseek-v2-lite"),
        pytest.param(
            replace(YARN, mscale=1.0, mscale_all_dim=1.0),
            (0.1 * math.log(40) + 1) ** 2,
            1.0,
            id="deepseek-v3",
        ),
        pytest.param(
            replace(YARN, mscale=1.0, mscale_all_dim=0.0),
            1.0,
            0.1 * math.log(40) + 1,
            id="no-mscale-all-dim",
        ),
        pytest.param(replace(YARN, factor=1.0), 1.0, 1.0, id="no-extension"),
    ],
)
def test_yarn_factors(yarn, softmax, rotation):
    assert yarn.softmax_scale_factor == pytest.approx(softmax, rel=1e-12)
    assert yarn.rotation_factor == pytest.approx(rotation, rel=1e-12)


def test_softmax_scale_counts_both_parts_of_a_head_and_yarn():
    assert MLA.qk_head_dim == 24
    assert MLA.softmax_scale == pytest.approx(24**-0.5, rel=1e-12)
    assert replace(MLA, rope=None).softmax_scale == pytest.approx(24**-0.5, rel=1e-12)
    rotated = replace(MLA, rope=replace(ROPE, yarn=YARN))
    scale = 24**-0.5 * YARN.softmax_scale_factor
    assert rotated.softmax_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("method", TopkMethod)
def test_only_noaux_tc_has_a_correction_bias(method):
    biased = replace(MOE, topk_method=method).has_correction_bias
    assert biased is (method is TopkMethod.NOAUX_TC)


@pytest.mark.parametrize(
    ("first_dense", "freq", "layers"),
    [(0, 1, (0, 1, 2, 3)), (1, 1, (1, 2, 3)), (0, 2, (0, 2)), (1, 2, (2,)), (9, 1, ())],
)
def test_moe_layers(first_dense, freq, layers):
    moe = replace(MOE, first_dense_layers=first_dense, layer_freq=freq)
    assert replace(MODEL, moe=moe).moe_layers == layers


def test_model_without_experts_has_no_moe_layers():
    assert MODEL.moe_layers == ()


def test_every_layer_is_kda_or_mla():
    assert MODEL.mla_layers == (0, 1, 2, 3)
    assert replace(MODEL, kda=KDA, kda_layers=(0, 2)).mla_layers == (1, 3)
