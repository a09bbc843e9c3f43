"""How often the routers of two models send the same token to the same experts."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.moe import Routing


class RouterAgreement:
    """The share of chosen experts that two models have in common, added up over tokens."""

    def __init__(self) -> None:
        """Start with no tokens."""
        self._common = 0
        self._chosen = 0

    def add(self, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        """Take the choices [N, k] of the same tokens in both models; nothing where none were made."""
        for ours, theirs in zip(found, expected, strict=True):
            self._common += int((ours.unsqueeze(-1) == theirs.unsqueeze(-2)).sum())
            self._chosen += ours.numel()

    @property
    def value(self) -> float | None:
        """From 0 to 1, whatever the order of the experts; None where no router took part."""
        return self._common / self._chosen if self._chosen else None


@contextmanager
def chosen_experts(layer: DecoderLayer) -> Generator[list[torch.Tensor]]:
    """Collect the experts [N, k] that a layer chooses in each call; none where it is dense."""
    chosen: list[torch.Tensor] = []

    def record(_router: nn.Module, _inputs: object, routing: Routing) -> None:
        chosen.append(routing.experts)

    if layer.moe is None:
        yield chosen
        return
    hook = layer.moe.router.register_forward_hook(record)
    try:
        yield chosen
    finally:
        hook.remove()
