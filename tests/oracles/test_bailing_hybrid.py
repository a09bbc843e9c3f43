"""BailingHybrid against transformers' BailingHybridForCausalLM, under its numerics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kimi_convert.config.huggingface import read_config
from kimi_convert.model.cache import new_cache
from kimi_convert.model.kda import KdaForm
from kimi_convert.model.loading import load_model
from kimi_convert.model.numerics import TRANSFORMERS
from tests.oracles.comparison import FP32_BOUND, load_theirs, random_tokens, relative_error
from tests.tiny import tiny_config, write_tiny_checkpoint

transformers = pytest.importorskip("transformers")
LINEAR, FULL = "linear_attention", "full_attention"
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@torch.inference_mode()
def logits_of_both(folder: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    theirs = load_theirs(transformers.BailingHybridForCausalLM, folder)
    ours = load_model(folder, numerics=TRANSFORMERS)
    return ours(tokens), theirs(tokens, use_cache=False).logits


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="group-of-four"),
        pytest.param({"layer_types": [FULL, LINEAR, FULL, LINEAR]}, id="mla-anywhere"),
        pytest.param({"num_hidden_layers": 5, "layer_types": [LINEAR] * 4 + [FULL]}, id="five"),
        pytest.param({"kda_lower_bound": -2.5, "rms_norm_eps": 1e-5}, id="other-bound-and-eps"),
        pytest.param({"n_group": 4, "topk_group": 2, "norm_topk_prob": False}, id="groups"),
        pytest.param({"first_k_dense_replace": 4}, id="all-dense"),
        pytest.param({"num_shared_experts": 2}, id="two-shared"),
        pytest.param({"rope_scaling": YARN}, id="yarn"),
        pytest.param({"short_conv_kernel_size": 2}, id="conv-of-two"),
    ],
)
def test_random_hybrids_agree(fields, tmp_path):
    config = tiny_config("bailing_hybrid", **fields)
    write_tiny_checkpoint(tmp_path, config, seed=5)
    ours, theirs = logits_of_both(tmp_path, random_tokens(config.vocab_size, 2, 150))
    assert relative_error(ours, theirs) <= FP32_BOUND


@pytest.mark.parametrize("form", [KdaForm.CHUNK, KdaForm.RECURRENT])
def test_prefill_then_decode_agrees_with_their_prefill(form, tmp_path):
    config = tiny_config("bailing_hybrid")
    write_tiny_checkpoint(tmp_path, config, seed=6)
    tokens = random_tokens(config.vocab_size, 2, 80)
    theirs = load_theirs(transformers.BailingHybridForCausalLM, tmp_path)
    ours = load_model(tmp_path, numerics=TRANSFORMERS)
    cache = new_cache(config, 2, dtype=torch.float32)
    with torch.inference_mode():
        pieces = [ours(part, cache, kda_form=form) for part in tokens.split([65, 12, 1, 1, 1], 1)]
        expected = theirs(tokens, use_cache=False).logits
    assert relative_error(torch.cat(pieces, 1), expected) <= FP32_BOUND


def test_checkpoint_saved_by_transformers_loads_and_agrees(tmp_path):
    written = tmp_path / "ours"
    write_tiny_checkpoint(written, tiny_config("bailing_hybrid"), seed=8)
    theirs = load_theirs(transformers.BailingHybridForCausalLM, written)
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs").kda_layers == (0, 1, 2)
    tokens = random_tokens(96, 2, 70)
    ours, expected = logits_of_both(tmp_path / "theirs", tokens)
    assert relative_error(ours, expected) <= FP32_BOUND
