from __future__ import annotations

import pytest
import torch

from kimi_convert.config.huggingface import read_config
from kimi_convert.errors import CheckpointError
from kimi_convert.exporters.safetensors import export_safetensors
from kimi_convert.validation.parity.artifacts import rounded_dtype
from tests.tiny import tiny_config, write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("a") / "c", tiny_config("kimi_linear"))


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [("float32", None), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_rounding_is_read_from_the_headers(checkpoint, tmp_path, dtype, rounded):
    export_safetensors(checkpoint, tmp_path / "out", dtype=dtype)
    assert rounded_dtype(checkpoint, read_config(checkpoint), tmp_path / "out") is rounded


def test_widening_is_no_rounding(tmp_path):
    narrow = write_tiny_checkpoint(tmp_path / "n", tiny_config("kimi_linear", dtype="bfloat16"))
    export_safetensors(narrow, tmp_path / "out", dtype="float32")
    assert rounded_dtype(narrow, read_config(narrow), tmp_path / "out") is None


def test_another_model_is_refused(checkpoint, tmp_path):
    other = write_tiny_checkpoint(tmp_path / "o", tiny_config("kimi_linear", vocab_size=64))
    with pytest.raises(CheckpointError, match="vocab_size"):
        rounded_dtype(checkpoint, read_config(checkpoint), other)
