"""Small MLA layers with random weights, and their inputs, for tests of a calibration."""

from __future__ import annotations

import torch

from kimi_convert.conversion.calibration.statistics import layer_statistics
from tests.tiny import tiny_config
from tests.unit.model.build import random_layer

TYPES = {
    "full-q": tiny_config("deepseek_v3"),
    "low-rank-q": tiny_config("deepseek_v3", q_lora_rank=20),
    "half-split": tiny_config("deepseek_v3", rope_interleave=False),
    "yarn": tiny_config(
        "deepseek_v3",
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
}


def mla_layer(tmp_path, config):
    mla = random_layer(tmp_path, config, 0, dtype=torch.float32).mla
    assert mla is not None
    return mla


def inputs(rows=4, length=40, width=32):
    """Correlated inputs with a mean, as normalised activations have."""
    mixing = torch.randn(width, width) / width**0.5
    return torch.randn(rows, length, width) @ mixing + 0.5


def statistics(tmp_path, config, x):
    return layer_statistics(mla_layer(tmp_path, config), x)
