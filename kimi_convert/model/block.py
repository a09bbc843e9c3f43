"""One decoder layer: x + mixer(norm x), then x + feed_forward(norm x).

The mixer is KDA or multi-head latent attention, the feed-forward dense or a mixture of experts, as
the config says for the layer. Both halves can be run alone, so that each can be measured.
"""

from __future__ import annotations

import torch
from torch import nn

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.model.cache import KdaCache, LayerCache, MlaCache
from kimi_convert.model.kda import KdaForm, KimiDeltaAttention
from kimi_convert.model.mla import MultiHeadLatentAttention
from kimi_convert.model.moe import MixtureOfExperts, Mlp
from kimi_convert.model.norm import RmsNorm
from kimi_convert.model.numerics import Numerics


class DecoderLayer(nn.Module):
    """A pre-norm residual layer; exactly one of `kda` and `mla`, one of `mlp` and `moe` is set."""

    def __init__(
        self, config: ModelConfig, layer_idx: int, numerics: Numerics, *, dtype: torch.dtype
    ) -> None:
        """Allocate the weights of one layer; their values come from a checkpoint.

        Args:
            config: the whole model.
            layer_idx: which layer, counted from 0.
            numerics: choices where implementations disagree.
            dtype: of weights and activations.
        """
        super().__init__()
        linear = layer_idx in config.kda_layers
        sparse = layer_idx in config.moe_layers
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RmsNorm(width, eps=eps, dtype=dtype)
        self.kda = KimiDeltaAttention(config, numerics, dtype=dtype) if linear else None
        self.mla = None if linear else MultiHeadLatentAttention(config, numerics, dtype=dtype)
        self.mlp_norm = RmsNorm(width, eps=eps, dtype=dtype)
        self.mlp = None if sparse else Mlp(width, config.intermediate_size, dtype=dtype)
        self.moe = MixtureOfExperts(config, numerics, dtype=dtype) if sparse else None

    def forward(
        self,
        hidden: torch.Tensor,
        cache: LayerCache | None = None,
        *,
        kda_form: KdaForm = KdaForm.AUTO,
    ) -> torch.Tensor:
        """Run the layer on hidden [B, T, D]; see `mix` for the arguments."""
        hidden = hidden + self.mix(hidden, cache, kda_form=kda_form)
        return hidden + self.feed_forward(hidden)

    def mix(
        self,
        hidden: torch.Tensor,
        cache: LayerCache | None = None,
        *,
        kda_form: KdaForm = KdaForm.AUTO,
    ) -> torch.Tensor:
        """Return the mixer's output before the residual addition.

        Args:
            hidden: [B, T, D], not normalised.
            cache: this layer's; continued from and updated in place.
            kda_form: how a KDA layer computes its recurrence.
        """
        x = self.input_norm(hidden)
        if self.kda is not None:
            assert cache is None or isinstance(cache, KdaCache)
            return self.kda(x, cache, form=kda_form)
        assert self.mla is not None
        assert cache is None or isinstance(cache, MlaCache)
        return self.mla(x, cache)

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the feed-forward's output [B, T, D] before the residual addition."""
        x = self.mlp_norm(hidden)
        if self.moe is not None:
            return self.moe(x)
        assert self.mlp is not None
        return self.mlp(x)
