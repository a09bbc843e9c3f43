"""One checked call of the short convolution: what every backend reads, for one or three inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Stream(NamedTuple):
    """One input with its weight and what came before it."""

    x: Tensor  # [B, T, P]
    weight: Tensor  # [P, 1, W]
    state: Tensor | None  # [N, P, W - 1] in x's dtype; zeros if None


class Convolved(NamedTuple):
    """What becomes of one input."""

    y: Tensor  # [B, T, P] in x's dtype
    state: Tensor  # [N, P, W - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One to three streams of the same sequences: T tokens in each of N, or N packed in T tokens."""

    streams: tuple[Stream, ...]
    cu_seqlens: Tensor | None  # [N + 1] int32 | int64, on the tensors' device
    N: int
    dtype: torch.dtype  # that is computed in

    @property
    def W(self) -> int:
        """Taps of every weight."""
        return self.streams[0].weight.shape[2]

    @property
    def T(self) -> int:
        """Tokens of a sequence, of all where they are packed."""
        return self.streams[0].x.shape[1]

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.streams[0].x.device

    def launches(self) -> tuple[Call, ...]:
        """Return what one launch each can serve: streams of the same dtypes, all with states or none."""
        kinds = {(s.x.dtype, s.weight.dtype, s.state is None) for s in self.streams}
        if len(kinds) == 1:
            return (self,)
        return tuple(replace(self, streams=(stream,)) for stream in self.streams)

    @property
    def needs_grad(self) -> bool:
        """Whether autograd must follow this call."""
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad
            for stream in self.streams
            for tensor in stream
        )
