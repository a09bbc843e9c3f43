"""What a layer has beside its mixer, where that is trained too: norms and feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from kimi_convert.conversion.rules import WITHOUT_GRADIENT
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.loading import LayerLoader, as_tabled

FROZEN: Mapping[str, torch.dtype] = MappingProxyType({})  # dtypes of what is trained: of nothing
# What a learning rate is multiplied by, in units of a parameter's own rms; a mixer's matrices take 16.
_OWN_RMS = 1.0  # of 0.5 to 16, by validation tokens of the example: docs/calibration.md


def rest_of(loader: LayerLoader, layer_idx: int) -> DecoderLayer:
    """Load what a layer has beside its mixer."""
    layer = loader.layer(layer_idx)
    layer.kda = layer.mla = None
    return layer


def stored_rest(
    loader: LayerLoader, layer_idx: int, stored: Mapping[str, torch.Tensor]
) -> DecoderLayer:
    """Return what a layer has beside its mixer, with the values that a training left of it."""
    rest = rest_of(loader, layer_idx)
    for name, parameter in rest.named_parameters():
        if name not in WITHOUT_GRADIENT:
            for tabled, part in as_tabled(rest, name, parameter.data).items():
                part.copy_(stored[tabled])
    return rest


def rest_dtypes(loader: LayerLoader, rest: DecoderLayer, layer_idx: int) -> dict[str, torch.dtype]:
    """Return the dtype that the file has for each parameter that is trained, by its name in `rest`."""
    names = {
        name: next(iter(as_tabled(rest, name, value)))
        for name, value in rest.named_parameters()
        if name not in WITHOUT_GRADIENT
    }
    return {
        name: loader.stored_dtype(f"layers.{layer_idx}.{tabled}") for name, tabled in names.items()
    }


def own_step_size(parameter: torch.Tensor) -> float:
    """Return what a learning rate is multiplied by for a parameter that is no mixer's."""
    rms = float(parameter.square().mean().sqrt())
    return _OWN_RMS * rms if rms > 0 else 1.0
