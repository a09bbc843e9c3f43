"""Exported checkpoints load in transformers, with every tensor used and none missed."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.exporters.safetensors import export_safetensors
from kimi_convert.model.loading import load_model
from kimi_convert.model.numerics import TRANSFORMERS
from kimi_convert.validation import validate_checkpoint
from tests.oracles.comparison import FP32_BOUND, load_theirs, random_tokens, relative_error
from tests.oracles.test_kimi_linear import randomised_native_model
from tests.tiny import tiny_config, write_tiny_checkpoint

transformers = pytest.importorskip("transformers")

CLASSES = {
    "kimi_linear": "KimiLinearForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", CLASSES)
def test_export_loads_and_agrees(kind, dtype, tmp_path):
    config = tiny_config(kind)
    source = write_tiny_checkpoint(tmp_path / "in", config)
    export_safetensors(source, tmp_path / "out", max_shard_bytes=60_000, dtype=dtype)
    theirs = load_theirs(getattr(transformers, CLASSES[kind]), tmp_path / "out")
    tokens = random_tokens(config.vocab_size, 2, 70)
    with torch.inference_mode():
        ours = load_model(tmp_path / "out", numerics=TRANSFORMERS)(tokens)
        assert relative_error(ours, theirs(tokens, use_cache=False).logits) <= FP32_BOUND


def test_checkpoint_of_transformers_is_exported_in_the_released_format(tmp_path):
    model = randomised_native_model()
    model.save_pretrained(tmp_path / "in")
    assert validate_checkpoint(tmp_path / "in").passed
    result = export_safetensors(tmp_path / "in", tmp_path / "out", max_shard_bytes=60_000)
    assert sorted(result.renamed.values()) == [
        f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("down", "gate", "up")
    ]
    tokens = random_tokens(96, 2, 70)
    theirs = load_theirs(transformers.KimiLinearForCausalLM, tmp_path / "out")
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits
        assert torch.equal(theirs(tokens, use_cache=False).logits, expected)
        ours = load_model(tmp_path / "out", numerics=TRANSFORMERS)(tokens)
        assert relative_error(ours, expected) <= FP32_BOUND
