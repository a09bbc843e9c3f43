"""config.json of the sources: routing, defaults of each version, and the way back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.config.architecture import RopeConfig, Scoring, TopkMethod
from kimi_convert.config.huggingface import config_to_json, parse_config
from tests.unit.config.documents import ABSENT, SOURCES, document_of, parsed, read_back, refusal

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
every_source = pytest.mark.parametrize("kind", SOURCES)
NEWER = pytest.mark.parametrize("kind", ["deepseek_v3", "kimi_k2"])


@every_source
def test_every_field_is_read(kind):
    config = parsed(kind)
    assert (config.model_type, config.num_layers, config.hidden_size) == (kind, 4, 32)
    assert (config.mla.num_heads, config.mla.kv_lora_rank, config.mla.q_lora_rank) == (4, 12, None)
    assert (config.mla.qk_nope_head_dim, config.mla.qk_rope_head_dim) == (16, 8)
    assert config.mla.rope == RopeConfig(theta=10000.0)
    assert (config.kda, config.kda_layers) == (None, ())
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (0, (1,), 2)
    moe = config.moe
    assert (moe.num_experts, moe.num_experts_per_token, moe.num_shared_experts) == (8, 3, 1)
    assert (moe.intermediate_size, moe.first_dense_layers, moe.layer_freq) == (24, 1, 1)
    assert (moe.num_groups, moe.topk_groups, moe.routed_scaling_factor) == (1, 1, 1.5)


@pytest.mark.parametrize(
    ("kind", "scoring", "method", "renormalize"),
    [
        ("deepseek_v2", Scoring.SOFTMAX, TopkMethod.GREEDY, False),
        ("deepseek_v3", Scoring.SIGMOID, TopkMethod.NOAUX_TC, True),
        ("kimi_k2", Scoring.SIGMOID, TopkMethod.NOAUX_TC, True),
    ],
)
def test_what_transformers_leaves_out_follows_from_the_version(kind, scoring, method, renormalize):
    absent = dict.fromkeys(("scoring_func", "topk_method", "norm_topk_prob"), ABSENT)
    moe = parsed(kind, **absent).moe
    assert (moe.scoring, moe.topk_method, moe.renormalize) == (scoring, method, renormalize)


ROUTING = (
    "n_shared_experts",
    "first_k_dense_replace",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
)


@NEWER
@pytest.mark.parametrize("value", [ABSENT, None], ids=["absent", "null"])
@pytest.mark.parametrize("name", ROUTING)
def test_version_3_must_state_its_routing(kind, name, value):
    assert refusal(kind, **{name: value}).message == f"config field {name!r} is missing"


def test_version_2_has_the_defaults_of_its_own_code():
    moe = parsed("deepseek_v2", **dict.fromkeys((*ROUTING, "moe_layer_freq"), ABSENT)).moe
    assert (moe.num_shared_experts, moe.first_dense_layers, moe.layer_freq) == (0, 0, 1)
    assert (moe.routed_scaling_factor, moe.num_groups, moe.topk_groups) == (1.0, 1, 1)


@every_source
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        pytest.param({"n_routed_experts": 10**9}, "n_routed_experts", id="experts"),
        pytest.param({"n_routed_experts": True}, "n_routed_experts", id="experts-boolean"),
        pytest.param({"n_routed_experts": 100_000}, "n_routed_experts", id="experts-in-all"),
        pytest.param({"num_experts_per_tok": 9}, "num_experts_per_tok", id="more-than-there-are"),
        pytest.param({"num_experts_per_tok": None}, "num_experts_per_tok", id="none-chosen"),
        pytest.param({"moe_intermediate_size": 0}, "moe_intermediate_size", id="empty-experts"),
        pytest.param({"first_k_dense_replace": -1}, "first_k_dense_replace", id="negative-dense"),
        pytest.param({"moe_layer_freq": 0}, "moe_layer_freq", id="no-frequency"),
        pytest.param({"n_group": 3}, "n_group", id="groups-that-do-not-divide"),
        pytest.param({"topk_group": 2}, "topk_group", id="more-groups-than-there-are"),
        pytest.param({"scoring_func": "tanh"}, "scoring_func", id="scoring"),
        pytest.param({"scoring_func": 1}, "scoring_func", id="scoring-number"),
        pytest.param({"topk_method": "random"}, "topk_method", id="method"),
        pytest.param({"norm_topk_prob": 1}, "norm_topk_prob", id="renormalize-number"),
        pytest.param({"routed_scaling_factor": 0}, "routed_scaling_factor", id="scale-of-zero"),
        pytest.param({"rope_scaling": []}, "rope_scaling", id="scaling-list"),
        pytest.param({"rope_parameters": 3}, "rope_parameters", id="parameters-number"),
        pytest.param(
            {"rope_scaling": {**YARN, "factor": float("nan")}}, "rope_scaling.factor", id="nan"
        ),
    ],
)
def test_config_that_cannot_be_is_refused_by_name(kind, changes, name):
    assert repr(name) in refusal(kind, **changes).message


@every_source
def test_both_names_of_the_experts_must_agree(kind):
    assert parsed(kind, num_local_experts=8).moe.num_experts == 8
    error = refusal(kind, num_local_experts=9)
    assert "'n_routed_experts' and 'num_local_experts'" in error.message


@every_source
def test_model_without_experts_is_dense(kind):
    config = parsed(kind, n_routed_experts=ABSENT)
    assert config.moe is None
    assert read_back(config) == config


@every_source
def test_new_spellings_are_written_in_the_old_one(kind):
    old = parsed(kind, rope_theta=7.0, rope_scaling=YARN)
    new = parsed(
        kind,
        rope_theta=ABSENT,
        rope_scaling=ABSENT,
        rope_parameters={**YARN, "rope_type": "yarn", "rope_theta": 7.0},
    )
    assert new == old
    written = config_to_json(new)
    assert written["rope_theta"] == 7.0
    assert "rope_parameters" not in written


sizes = st.integers(1, 64)


@st.composite
def source_documents(draw):
    groups = draw(st.integers(1, 4))
    topk_groups = draw(st.integers(1, groups))
    per_group = draw(st.integers(1, 4))
    yarn = st.fixed_dictionaries(
        {
            "type": st.just("yarn"),
            "factor": st.floats(1, 64),
            "original_max_position_embeddings": sizes,
        },
        optional={"mscale": st.floats(0, 2), "mscale_all_dim": st.floats(0, 2)},
    )
    changes = {
        "hidden_size": draw(sizes),
        "num_hidden_layers": draw(st.integers(1, 9)),
        "num_nextn_predict_layers": draw(st.integers(0, 2)),
        "q_lora_rank": draw(st.none() | sizes),
        "qk_rope_head_dim": 2 * draw(st.integers(0, 8)),
        "n_routed_experts": draw(st.none() | st.just(groups * per_group)),
        "num_experts_per_tok": draw(st.integers(1, topk_groups * per_group)),
        "n_shared_experts": draw(st.integers(0, 3)),
        "first_k_dense_replace": draw(st.integers(0, 12)),
        "moe_layer_freq": draw(st.integers(1, 3)),
        "n_group": groups,
        "topk_group": topk_groups,
        "scoring_func": draw(st.sampled_from(list(Scoring))),
        "topk_method": draw(st.sampled_from(list(TopkMethod))),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.floats(0.125, 20)),
        "rms_norm_eps": draw(st.floats(1e-8, 1e-2)),
        "rope_theta": draw(st.floats(2, 1e7)),
        "rope_scaling": draw(st.none() | yarn),
        "rope_interleave": draw(st.booleans()),
        "eos_token_id": draw(st.none() | sizes | st.lists(sizes, max_size=3)),
        "tie_word_embeddings": draw(st.booleans()),
        "quantization_config": draw(st.none() | st.just({"quant_method": "fp8"})),
        "use_cache": draw(st.booleans()),
        "an_unknown_field": draw(st.none() | st.text(max_size=5) | st.lists(sizes, max_size=2)),
    }
    return document_of(draw(st.sampled_from(SOURCES)), **changes)


@given(source_documents())
def test_config_that_is_written_is_read_back(document):
    config = parse_config(document)
    written = json.loads(json.dumps(config_to_json(config)))
    assert parse_config(written) == config
    assert config_to_json(parse_config(written)) == written
    assert list(written) == sorted(written)
