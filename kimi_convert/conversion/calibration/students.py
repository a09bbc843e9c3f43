"""The mixers of a hybrid as modules that run, made from fitted parameters.

They compute in fp32 with weights rounded to the dtype that they will be stored in, so that what is
solved after them makes up for the rounding. Each gives its features, which the output matrix turns
into the mixer's output; the matrix itself is solved later and never part of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import nn

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.conversion.calibration.fold import fold_query
from kimi_convert.model.kda import KimiDeltaAttention
from kimi_convert.model.mla import MultiHeadLatentAttention
from kimi_convert.model.numerics import SERVED

_ROWS = 8  # sequences in one call: bounds activations
# Parameters that the format keeps in fp32.
_PRECISE = frozenset({"A_log", "dt_bias"})


class Student(Protocol):
    """A mixer without its output matrix."""

    prefix: str  # of its parameters: "kda." or "mla."

    @property
    def module(self) -> nn.Module:
        """What turns x [N, T, D] into features."""
        ...

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Round a parameter to what its file will hold."""
        ...

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return [N, T, F] of normalised inputs [N, T, D]."""
        ...

    def parameters(self) -> Mapping[str, torch.Tensor]:
        """Return what is to be stored, by the names of the layer's modules."""
        ...


class KdaStudent:
    """A converted layer's mixer."""

    prefix = "kda."

    def __init__(self, config: ModelConfig, parameters: Mapping[str, torch.Tensor]) -> None:
        """Fill a mixer of the hybrid's config.

        Args:
            config: of the hybrid.
            parameters: "kda.q.weight" and so on; the output matrix is left out.
        """
        device = parameters["kda.q.weight"].device
        self.module = _empty(KimiDeltaAttention, config, device)
        self.module.o = nn.Identity()  # type: ignore[assignment]
        self._stored = _stored_dtype(config)
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self.rounded(name, parameters[f"kda.{name}"]))

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Round a parameter to what its file will hold."""
        return _rounded(values, name, self._stored)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return normed, gated head outputs [N, T, H V]."""
        return torch.cat([self.module(part) for part in x.split(_ROWS)])

    def parameters(self) -> Mapping[str, torch.Tensor]:
        """Return every parameter but the output matrix."""
        return {f"kda.{name}": value.detach() for name, value in self.module.named_parameters()}


class MlaStudent:
    """A kept layer's mixer."""

    prefix = "mla."

    def __init__(self, config: ModelConfig, parameters: Mapping[str, torch.Tensor]) -> None:
        """Fill a mixer of the hybrid's config.

        Args:
            config: of the hybrid.
            parameters: "mla.kv_a.weight" and so on; the output matrix is left out.
        """
        device = parameters["mla.kv_a.weight"].device
        self.module = _empty(MultiHeadLatentAttention, config, device)
        self.module.o = nn.Identity()  # type: ignore[assignment]
        self._stored = _stored_dtype(config)
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self.rounded(name, parameters[f"mla.{name}"]))

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Round a parameter to what its file will hold."""
        return _rounded(values, name, self._stored)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the heads' outputs [N, T, H V]."""
        return torch.cat([self.module(part) for part in x.split(_ROWS)])

    def parameters(self) -> Mapping[str, torch.Tensor]:
        """Return every parameter but the output matrix; only training changes more than the query."""
        return {f"mla.{name}": value.detach() for name, value in self.module.named_parameters()}


def kept_parameters(
    config: ModelConfig, teacher: MultiHeadLatentAttention, lags: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return a layer's mixer as it stays, its output matrix left out.

    Args:
        config: of the hybrid.
        teacher: the layer's mixer.
        lags: [H, T] to fold the rotation by; None to drop what rotates. For a hybrid that rotates,
            neither is done.
    """
    kept: dict[str, torch.Tensor] = {
        f"mla.{name}": value for name, value in teacher.named_parameters() if name != "o.weight"
    }
    if config.mla.gated:
        kept["mla.gate.weight"] = teacher.o.weight.new_zeros(
            config.mla.num_heads, config.hidden_size
        )
    if config.mla.rope is not None:
        return kept
    query = "mla.q.weight" if teacher.sizes.q_lora_rank is None else "mla.q_b.weight"
    kept[query] = _fold_or_drop(kept[query], lags, teacher)
    return kept


def kept_output(config: ModelConfig, teacher: MultiHeadLatentAttention) -> torch.Tensor:
    """Return the output matrix [F, D] of a layer that stays: doubled under a gate of one half."""
    return teacher.o.weight.float().T * (2 if config.mla.gated else 1)


def _fold_or_drop(
    query: torch.Tensor, lags: torch.Tensor | None, teacher: MultiHeadLatentAttention
) -> torch.Tensor:
    sizes = teacher.sizes
    if lags is not None:
        return fold_query(query, lags, sizes)
    folded = fold_query(query, query.new_ones(sizes.num_heads, 1), sizes)
    heads = folded.unflatten(0, (sizes.num_heads, sizes.qk_head_dim))
    heads[:, sizes.qk_nope_head_dim :] = 0
    return heads.flatten(0, 1)


_Module = TypeVar("_Module", bound=nn.Module)


def _empty(kind: Callable[..., _Module], config: ModelConfig, device: torch.device) -> _Module:
    with torch.device("meta"):
        module = kind(config, SERVED, dtype=torch.float32)
    return module.to_empty(device=device).requires_grad_(False)


def _stored_dtype(config: ModelConfig) -> torch.dtype:
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _rounded(values: torch.Tensor, name: str, stored: torch.dtype) -> torch.Tensor:
    return values.float() if name in _PRECISE else values.to(stored).float()
