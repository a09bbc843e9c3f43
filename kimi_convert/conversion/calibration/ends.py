"""What a model begins and ends with: embedding, final norm and output matrix, trained or not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kimi_convert.conversion.calibration.ranks import whole
from kimi_convert.conversion.calibration.rest import FROZEN, own_step_size
from kimi_convert.model.language_model import Head
from kimi_convert.model.loading import LayerLoader


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
            name: own_step_size(value.detach()) for name, value in self.trained().items()
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


def stored_ends(loader: LayerLoader, stored: Mapping[str, torch.Tensor]) -> Ends:
    """Return the ends of a model with the values that a training left of them."""
    ends = Ends(loader.embedding(), loader.head())
    for name, parameter in ends.parameters().items():
        parameter.data.copy_(stored[name])
    return ends
