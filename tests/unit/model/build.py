"""Random modules for the model tests, with weights that a checkpoint would have."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.loading import open_layers
from kimi_convert.model.numerics import SERVED, Numerics
from tests.tiny import write_tiny_checkpoint


def random_layer(
    folder: Path,
    config: ModelConfig,
    layer_idx: int,
    numerics: Numerics = SERVED,
    dtype: torch.dtype = torch.float32,
) -> DecoderLayer:
    write_tiny_checkpoint(folder, config, seed=1)
    with open_layers(folder, dtype=dtype, numerics=numerics) as layers:
        return layers.layer(layer_idx)


def random_hidden(
    config: ModelConfig, length: int, batch_size: int = 2, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch_size, length, config.hidden_size, generator=generator).to(dtype)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    assert ours.shape == expected.shape
    return ((ours - expected).abs().max() / expected.abs().max()).item()


class LargestTensor(TorchDispatchMode):
    """Remembers how many bytes the largest storage of a tensor made within it has."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self.nbytes = max(self.nbytes, one.untyped_storage().nbytes())
        return made
