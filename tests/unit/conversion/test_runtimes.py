"""Which runtimes a config is said to load in, and why not. The oracle tests run two of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kimi_convert.conversion.runtimes import runtime_support
from tests.tiny import linear_attn_config, tiny_config

NATIVE = "transformers (native, 5.23 and later)"
REMOTE = "transformers (released remote code)"
ALL = {NATIVE, REMOTE, "vLLM", "SGLang", "mlx-lm", "llama.cpp"}


def refusing(config):
    return {one.runtime for one in runtime_support(config) if not one.loads}


def test_released_architecture_loads_everywhere():
    found = runtime_support(tiny_config("kimi_linear"))
    assert {one.runtime for one in found} == ALL
    assert all(one.loads and one.reasons == () for one in found)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param(
            {"q_lora_rank": 20}, {REMOTE, "vLLM", "SGLang", "mlx-lm"}, id="low-rank-query"
        ),
        pytest.param(
            {"moe_router_activation_func": "softmax"}, {NATIVE, "SGLang"}, id="softmax-routing"
        ),
        pytest.param({"moe_layer_freq": 2}, {NATIVE, "llama.cpp"}, id="every-other-layer-dense"),
        pytest.param({"moe_renormalize": False}, {"llama.cpp"}, id="weights-not-renormalized"),
        pytest.param(
            {"linear_attn_config": linear_attn_config(4, [])}, {"mlx-lm"}, id="no-mla-layer"
        ),
        pytest.param(
            {"q_lora_rank": 20, "moe_router_activation_func": "softmax"},
            ALL - {"llama.cpp"},
            id="low-rank-query-and-softmax",
        ),
    ],
)
def test_runtimes_that_refuse(fields, expected):
    assert refusing(tiny_config("kimi_linear", **fields)) == expected


def test_runtimes_that_refuse_a_model_without_experts():
    config = replace(tiny_config("kimi_linear"), moe=None)
    assert refusing(config) == {NATIVE, "mlx-lm", "llama.cpp"}


def test_every_reason_is_given():
    config = tiny_config("kimi_linear", q_lora_rank=20, moe_router_activation_func="softmax")
    (sglang,) = (one for one in runtime_support(config) if one.runtime == "SGLang")
    assert sglang.to_json() == {
        "runtime": "SGLang",
        "loads": False,
        "reasons": [
            "needs a full-rank q (q_lora_rank null)",
            "routes by sigmoid only, this model by softmax",
        ],
    }
