"""What a model begins and ends with, and which parameters beside mixers a training of all moves."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from kimi_convert.conversion.calibration.ranks import whole
from kimi_convert.conversion.rules import WITHOUT_GRADIENT
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.language_model import Head
from kimi_convert.model.loading import LayerLoader, as_tabled

FROZEN: Mapping[str, torch.dtype] = MappingProxyType({})
# What a learning rate is multiplied by, in units of a parameter's own rms; a mixer's matrices take 16.
_OWN_RMS = 1.0


class Ends:
    """Embedding, final norm and output matrix."""

    def __init__(
        self, embed: nn.Embedding, head: Head, *, dtypes: Mapping[str, torch.dtype] = FROZEN
    ) -> None:
        """Take them over.

        Args:
            embed: the embedding.
            head: the output matrix, with the final norm.
            dtypes: that each has in its file, where all are trained.
        """
        self.embed, self.head = embed, head
        self._dtypes = dtypes
        self.step_sizes = {
            name: step_size(value.detach()) for name, value in self.trained().items()
        }
        for value in self.trained().values():
            value.requires_grad_()

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What holds parameters."""
        return (self.embed, self.head, self.head.norm)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all by name."""
        return {
            "embed.weight": self.embed.get_parameter("weight"),
            "norm.weight": self.head.norm.weight,
            "head.weight": self.head.weight,
        }

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained by name."""
        return {name: value for name, value in self.parameters().items() if name in self._dtypes}

    def rounded(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Round one of `trained` to what its file will hold."""
        return value.to(self._dtypes[name]).float()

    def stored(self) -> dict[str, torch.Tensor]:
        """Return what is trained as a checkpoint shapes it."""
        return {name: whole(value.detach()) for name, value in self.trained().items()}


def trained_ends(loader: LayerLoader) -> Ends:
    """Load the ends of a model to be trained; tied ones part."""
    ends = Ends(loader.embedding(), loader.head())
    dtypes = {name: loader.stored_dtype(name) for name in ends.parameters()}
    return Ends(ends.embed, ends.head, dtypes=dtypes)


def rest_of(loader: LayerLoader, layer_idx: int) -> DecoderLayer:
    """Load what a layer has beside its mixer."""
    layer = loader.layer(layer_idx)
    layer.kda = layer.mla = None
    return layer


def stored_ends(loader: LayerLoader, stored: Mapping[str, torch.Tensor]) -> Ends:
    """Return the ends of a model with the values that a training left of them."""
    ends = Ends(loader.embedding(), loader.head())
    for name, parameter in ends.parameters().items():
        parameter.data.copy_(stored[name])
    return ends


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


def rest_dtypes(
    loader: LayerLoader, layer: DecoderLayer, layer_idx: int
) -> dict[str, torch.dtype]:
    """Return what is trained of a layer without its mixer, with the dtype that its file has."""
    names = {
        name: next(iter(as_tabled(layer, name, value)))
        for name, value in layer.named_parameters()
        if name not in WITHOUT_GRADIENT
    }
    return {
        name: loader.stored_dtype(f"layers.{layer_idx}.{tabled}") for name, tabled in names.items()
    }


def step_size(parameter: torch.Tensor) -> float:
    """Return what a learning rate is multiplied by for a parameter that is no mixer's."""
    rms = float(parameter.square().mean().sqrt())
    return _OWN_RMS * rms if rms > 0 else 1.0
