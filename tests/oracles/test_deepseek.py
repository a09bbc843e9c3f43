"""MlaTransformer against transformers' DeepSeek-V2 and DeepSeek-V3, under its numerics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kimi_convert.model.loading import load_model
from kimi_convert.model.numerics import TRANSFORMERS
from tests.oracles.comparison import FP32_BOUND, load_theirs, random_tokens, relative_error
from tests.tiny import tiny_config, write_tiny_checkpoint

transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "moonlet-7m"
CLASSES = {
    "deepseek_v2": transformers.DeepseekV2ForCausalLM,
    "deepseek_v3": transformers.DeepseekV3ForCausalLM,
}


def yarn(mscale: float, mscale_all_dim: float, **changes: float) -> dict[str, object]:
    return {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
        **changes,
    }


@torch.inference_mode()
def error_against(model_class: type, folder: Path, tokens: torch.Tensor) -> float:
    ours = load_model(folder, numerics=TRANSFORMERS)
    theirs = load_theirs(model_class, folder)
    return relative_error(ours(tokens), theirs(tokens, use_cache=False).logits)


def test_example_checkpoint_agrees():
    tokens = random_tokens(4096, 2, 257)
    assert error_against(CLASSES["deepseek_v3"], EXAMPLE, tokens) <= FP32_BOUND


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        pytest.param("deepseek_v3", {}, id="v3"),
        pytest.param("deepseek_v3", {"q_lora_rank": 20}, id="v3-q_lora"),
        pytest.param("deepseek_v3", {"rope_interleave": False}, id="v3-half-split"),
        pytest.param("deepseek_v3", {"rope_scaling": yarn(1.0, 1.0)}, id="v3-yarn"),
        pytest.param(
            "deepseek_v3",
            {"rope_scaling": yarn(1.0, 0.707, beta_fast=1.0), "rope_interleave": False},
            id="v3-yarn-unequal-mscale-half-split",
        ),
        pytest.param(
            "deepseek_v3",
            {"n_group": 4, "topk_group": 2, "q_lora_rank": 20},
            id="v3-groups-q_lora",
        ),
        pytest.param("deepseek_v3", {"norm_topk_prob": False}, id="v3-not-renormalized"),
        pytest.param("deepseek_v3", {"n_shared_experts": 0}, id="v3-no-shared-expert"),
        pytest.param("deepseek_v3", {"n_shared_experts": 2}, id="v3-two-shared-experts"),
        pytest.param("deepseek_v3", {"first_k_dense_replace": 4}, id="v3-dense"),
        pytest.param("deepseek_v3", {"v_head_dim": 32}, id="v3-values-wider-than-keys"),
        pytest.param("deepseek_v2", {}, id="v2-greedy"),
        pytest.param(
            "deepseek_v2",
            {"q_lora_rank": 20, "rope_scaling": yarn(0.707, 0.707), "n_shared_experts": 2},
            id="v2-q_lora-yarn-two-shared-experts",
        ),
        pytest.param("deepseek_v2", {"rope_scaling": yarn(1.0, 0.0)}, id="v2-yarn-no-all_dim"),
        pytest.param("deepseek_v2", {"n_shared_experts": 0}, id="v2-no-shared-expert"),
        pytest.param(
            "deepseek_v2",
            {
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 16.0,
            },
            id="v2-group-limited",
        ),
    ],
)
def test_random_models_agree(kind, fields, tmp_path):
    config = tiny_config(kind, **fields)
    write_tiny_checkpoint(tmp_path, config, seed=3)
    tokens = random_tokens(config.vocab_size, 2, 101)
    assert error_against(CLASSES[kind], tmp_path, tokens) <= FP32_BOUND


@torch.inference_mode()
def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path):
    fields = {"rope_scaling": yarn(1.0, 1.0), "q_lora_rank": 20}
    for kind in ("kimi_k2", "deepseek_v3"):
        write_tiny_checkpoint(tmp_path / kind, tiny_config(kind, **fields), seed=3)
    tokens = random_tokens(96, 1, 40)
    ours = load_model(tmp_path / "kimi_k2", numerics=TRANSFORMERS)
    theirs = load_theirs(CLASSES["deepseek_v3"], tmp_path / "deepseek_v3")
    assert relative_error(ours(tokens), theirs(tokens, use_cache=False).logits) <= FP32_BOUND
