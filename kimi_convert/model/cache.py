"""What a model remembers between calls: latents for MLA layers, a state for KDA layers.

A call that is given a cache continues from it and updates it in place. What is kept is detached:
no gradient flows through a cache. Sequences of one batch have equal length; there is no padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kimi_convert.config.architecture import ModelConfig

_FIRST_CAPACITY = 64


class MlaCache:
    """Rows [B, S, R + r] of the S tokens seen: latents, then shared rope keys.

    Storage grows by doubling, so that T one-token steps copy O(T) rows, not O(T^2).
    """

    def __init__(
        self, batch_size: int, config: ModelConfig, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Start empty."""
        self.length = 0
        width = config.mla.kv_lora_rank + config.mla.qk_rope_head_dim
        self._rows = torch.empty(batch_size, 0, width, dtype=dtype, device=device)

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Keep new tokens and return all of them.

        Args:
            rows: [B, T, R + r]; latents after their norm, rope keys rotated where the layer
                rotates.

        Returns:
            A view [B, S, R + r] of everything kept, the new tokens last.
        """
        end = self.length + rows.shape[1]
        capacity = self._rows.shape[1]
        if end > capacity:
            self._grow(max(end, 2 * capacity, _FIRST_CAPACITY))
        self._rows[:, self.length : end] = rows.detach()
        self.length = end
        return self.rows

    @property
    def rows(self) -> torch.Tensor:
        """A view [B, S, R + r] of everything kept."""
        return self._rows[:, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of storage, what is reserved included."""
        return self._rows.nbytes

    def _grow(self, capacity: int) -> None:
        batch_size, _, width = self._rows.shape
        rows = self._rows.new_empty(batch_size, capacity, width)
        rows[:, : self.length] = self._rows[:, : self.length]
        self._rows = rows


@dataclass(slots=True)
class KdaCache:
    """The state of one KDA layer; every field is None before the first token.

    A call puts new tensors here, or, for one token on Triton, writes over these: who wants to keep
    one across calls clones it.
    """

    state: torch.Tensor | None = None  # [B, H, K, V] fp32
    q_conv: torch.Tensor | None = None  # the last W - 1 inputs of each convolution
    k_conv: torch.Tensor | None = None
    v_conv: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        kept = (self.state, self.q_conv, self.k_conv, self.v_conv)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)


LayerCache = MlaCache | KdaCache


@dataclass(slots=True)
class ModelCache:
    """One cache per layer, and how many tokens they have seen."""

    layers: list[LayerCache]
    position: int = field(default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of storage of all layers."""
        return sum(layer.nbytes for layer in self.layers)


def new_cache(
    config: ModelConfig, batch_size: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> ModelCache:
    """Return an empty cache.

    Args:
        config: the model that will use it.
        batch_size: how many sequences run side by side.
        dtype: of the model's activations.
        device: of the model.
    """
    kda_layers = set(config.kda_layers)
    at = torch.device(device)
    return ModelCache(
        [
            KdaCache()
            if layer_idx in kda_layers
            else MlaCache(batch_size, config, dtype=dtype, device=at)
            for layer_idx in range(config.num_layers)
        ]
    )
