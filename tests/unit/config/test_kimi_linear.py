"""config.json of Kimi-Linear: the released spelling, transformers' own, and the way back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.config.architecture import KdaConfig, Scoring, TopkMethod
from kimi_convert.config.huggingface import config_to_json, parse_config
from tests.tiny import linear_attn_config
from tests.unit.config.documents import ABSENT, document_of, nested, parsed, read_back, refusal

KIND = "kimi_linear"
TYPES = ["linear_attention"] * 3 + ["full_attention"]
NATIVE = {
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": TYPES,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}
SIZES = {
    "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}


def linear(**changes):
    return {"linear_attn_config": nested(KIND, "linear_attn_config", **changes)}


def test_every_field_is_read():
    config = parsed(KIND)
    assert config.kda == KdaConfig(num_heads=4, head_dim=16, conv_size=4)
    assert (config.kda_layers, config.mla_layers) == ((0, 1, 2), (3,))
    assert config.mla.rope is None
    assert config.max_positions == 4096
    moe = config.moe
    assert (moe.num_experts, moe.num_experts_per_token, moe.num_shared_experts) == (8, 3, 1)
    assert (moe.intermediate_size, moe.first_dense_layers, moe.layer_freq) == (24, 1, 1)
    assert (moe.scoring, moe.topk_method) == (Scoring.SIGMOID, TopkMethod.NOAUX_TC)
    assert (moe.renormalize, moe.routed_scaling_factor) == (True, 1.5)


def test_spelling_of_transformers_reads_the_same():
    released = parsed(KIND)
    native = parsed(KIND, linear_attn_config=ABSENT, first_k_dense_replace=ABSENT, **NATIVE)
    assert native == released
    assert parsed(KIND, **NATIVE) == released


@pytest.mark.parametrize(
    ("released", "native"),
    [
        ("num_experts", "num_local_experts"),
        ("num_experts_per_token", "num_experts_per_tok"),
        ("num_shared_experts", "n_shared_experts"),
        ("moe_renormalize", "norm_topk_prob"),
        ("num_expert_group", "n_group"),
    ],
)
def test_both_spellings_of_a_field_are_read_and_must_agree(released, native):
    value = document_of(KIND)[released]
    assert parsed(KIND, **{released: ABSENT, native: value}) == parsed(KIND)
    assert parsed(KIND, **{native: value}) == parsed(KIND)
    other = not value if isinstance(value, bool) else value + 1
    error = refusal(KIND, **{native: other})
    assert f"{released!r} and {native!r}" in error.message


@pytest.mark.parametrize(("released", "native"), SIZES.items())
def test_kda_sizes_that_contradict_each_other_are_refused_by_name(released, native):
    error = refusal(KIND, **{native: 99})
    assert f"'linear_attn_config.{released}' and {native!r}" in error.message


@pytest.mark.parametrize("name", SIZES)
def test_missing_kda_size_is_refused_by_name(name):
    error = refusal(KIND, **linear(**{name: ABSENT}))
    assert error.message == f"config field 'linear_attn_config.{name}' is missing"


@pytest.mark.parametrize("value", [0, -4, 10**9, True, 4.0, "4", [4]], ids=repr)
@pytest.mark.parametrize("name", SIZES)
def test_kda_size_that_no_tensor_has_is_refused_by_name(name, value):
    error = refusal(KIND, **linear(**{name: value}))
    assert f"'linear_attn_config.{name}'" in error.message


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        pytest.param({"linear_attn_config": ABSENT}, "linear_attn_config", id="no-lists"),
        pytest.param({"linear_attn_config": [1]}, "linear_attn_config", id="list"),
        pytest.param(
            linear(kda_layers=[0, 1, 2], full_attn_layers=[3]),
            "linear_attn_config.kda_layers",
            id="lists-from-zero",
        ),
        pytest.param(
            linear(gate_lower_bound=-5.0), "linear_attn_config.gate_lower_bound", id="bounded-gate"
        ),
        pytest.param(
            linear(kda_layers=[], full_attn_layers=[1, 2, 3, 4]), "linear_attn_config", id="no-kda"
        ),
        pytest.param({"mla_use_nope": False}, "mla_use_nope", id="rotates"),
        pytest.param({"mla_use_nope": 1}, "mla_use_nope", id="nope-number"),
        pytest.param({"num_experts": 10**9}, "num_experts", id="experts"),
        pytest.param({"num_experts_per_token": 9}, "num_experts_per_token", id="too-many-chosen"),
        pytest.param({"moe_router_activation_func": "relu"}, "moe_router_activation_func", id="x"),
        pytest.param({"use_grouped_topk": "yes"}, "use_grouped_topk", id="grouped-text"),
        pytest.param(
            {"use_grouped_topk": False, "num_expert_group": 2, "topk_group": 2},
            "use_grouped_topk",
            id="groups-that-are-not-used",
        ),
        pytest.param(
            {"layer_types": TYPES[::-1]}, "layer_types", id="layer-types-that-contradict"
        ),
        pytest.param(
            {"mlp_layer_types": ["sparse"] * 4}, "mlp_layer_types", id="mlp-types-that-contradict"
        ),
    ],
)
def test_config_that_cannot_be_is_refused_by_name(changes, name):
    assert repr(name) in refusal(KIND, **changes).message


def test_groups_may_be_unused_where_there_is_one():
    config = parsed(KIND, use_grouped_topk=False)
    assert config == parsed(KIND)


@pytest.mark.parametrize(
    ("name", "value"), [("rope_theta", 7.0), ("rope_scaling", {"type": "x"}), ("head_dim", 9)]
)
def test_fields_without_effect_are_carried(name, value):
    config = parsed(KIND, **{name: value})
    assert config.carried == {name: value}
    assert config_to_json(config)[name] == value


def test_every_field_of_the_released_config_is_written():
    written = config_to_json(parsed(KIND, head_dim=ABSENT, rope_theta=ABSENT, rope_scaling=ABSENT))
    assert (written["head_dim"], written["rope_theta"], written["rope_scaling"]) == (
        8,
        10000.0,
        None,
    )
    assert (written["use_grouped_topk"], written["mla_use_nope"]) == (True, True)
    assert written["architectures"] == ["KimiLinearForCausalLM"]
    assert written["linear_attn_config"]["kda_layers"] == [1, 2, 3]
    assert "topk_method" not in written


def test_model_without_experts_is_dense():
    config = parsed(KIND, num_experts=ABSENT)
    assert config.moe is None
    assert read_back(config) == config


@st.composite
def hybrid_documents(draw):
    num_layers = draw(st.integers(1, 9))
    layers = st.integers(0, num_layers - 1)
    mla_layers = sorted(draw(st.sets(layers, max_size=num_layers - 1)))
    groups = draw(st.integers(1, 3))
    changes = {
        "num_hidden_layers": num_layers,
        "linear_attn_config": linear_attn_config(
            num_layers,
            mla_layers,
            num_heads=draw(st.integers(1, 9)),
            head_dim=draw(st.integers(1, 64)),
            conv_size=draw(st.integers(1, 8)),
        ),
        "num_experts": draw(st.none() | st.just(groups * 4)),
        "num_expert_group": groups,
        "topk_group": draw(st.integers(1, groups)),
        "num_experts_per_token": draw(st.integers(1, 4)),
        "num_shared_experts": draw(st.integers(0, 2)),
        "first_k_dense_replace": draw(st.integers(0, 12)),
        "moe_renormalize": draw(st.booleans()),
        "moe_router_activation_func": draw(st.sampled_from(list(Scoring))),
        "topk_method": draw(st.sampled_from(list(TopkMethod))),
        "num_nextn_predict_layers": draw(st.integers(0, 2)),
        "q_lora_rank": draw(st.none() | st.integers(1, 64)),
        "head_dim": draw(st.none() | st.integers(1, 64)),
        "rope_theta": draw(st.none() | st.floats(2, 1e7)),
        "use_cache": draw(st.booleans()),
        "an_unknown_field": draw(st.none() | st.text(max_size=5)),
    }
    return document_of(KIND, **changes)


@given(hybrid_documents())
def test_config_that_is_written_is_read_back(document):
    config = parse_config(document)
    written = json.loads(json.dumps(config_to_json(config)))
    assert parse_config(written) == config
    assert config_to_json(parse_config(written)) == written
    assert list(written) == sorted(written)
