"""KimiLinear against mlx-lm on the CPU, as served: mlx-lm reads the released format."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kimi_convert.model.loading import load_model
from tests.oracles.comparison import FP32_BOUND, random_tokens, relative_error
from tests.tiny import tiny_config, write_tiny_checkpoint

mx = pytest.importorskip("mlx.core")
mlx_utils = pytest.importorskip("mlx_lm.utils")


@pytest.fixture(autouse=True)
def cpu_device():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.mark.parametrize("num_layers", [4, 5])
def test_released_format_agrees(num_layers, tmp_path):
    config = tiny_config("kimi_linear", num_hidden_layers=num_layers)
    write_tiny_checkpoint(tmp_path, config, seed=9)
    tokens = random_tokens(config.vocab_size, 2, 80)
    theirs, _ = mlx_utils.load_model(tmp_path)
    logits = np.array(theirs(mx.array(tokens.numpy())).astype(mx.float32))
    with torch.inference_mode():
        ours = load_model(tmp_path)(tokens)
    assert relative_error(ours, torch.from_numpy(logits)) <= FP32_BOUND
