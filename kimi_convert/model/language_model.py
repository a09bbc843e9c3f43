"""What both model families share: embedding, a stack of decoder layers, final norm and head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.cache import ModelCache
from kimi_convert.model.kda import KdaForm
from kimi_convert.model.norm import RmsNorm
from kimi_convert.model.numerics import Numerics, wide


class LanguageModel(nn.Module):
    """A causal language model whose layers are as its config says.

    The keys of its state dict are the parameter names of the naming tables, but for the routed
    experts, which are stacked per layer.
    """

    def __init__(
        self, config: ModelConfig, numerics: Numerics | None = None, *, dtype: torch.dtype
    ) -> None:
        """Allocate all weights; their values come from a checkpoint.

        Args:
            config: sizes, and which layer is of which kind.
            numerics: choices where implementations disagree; as served by default.
            dtype: of weights and activations. Decay parameters and router stay fp32.
        """
        super().__init__()
        chosen = numerics or Numerics()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer_idx, chosen, dtype=dtype)
            for layer_idx in range(config.num_layers)
        )
        self.norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head = Head(config, self.norm, dtype=dtype)

    def forward(
        self,
        tokens: torch.Tensor,
        cache: ModelCache | None = None,
        *,
        kda_form: KdaForm = KdaForm.AUTO,
    ) -> torch.Tensor:
        """Predict the next token at every position.

        Prefill, prefill in pieces and decode of one token are the same call with a cache.

        Args:
            tokens: [B, T] int64; no padding.
            cache: continued from and updated in place.
            kda_form: how KDA layers compute their recurrence.

        Returns:
            Logits [B, T, vocab] fp32.
        """
        hidden = self.embed(tokens)  # [B, T, D]
        for layer_idx, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[layer_idx]
            hidden = layer(hidden, layer_cache, kda_form=kda_form)
        if cache is not None:
            cache.position += tokens.shape[1]
        return self.head(hidden)


class Head(nn.Module):
    """Final norm and output matrix: logits = W norm(x)."""

    def __init__(self, config: ModelConfig, norm: RmsNorm, *, dtype: torch.dtype) -> None:
        """Allocate the output matrix; `norm` belongs to the model.

        Args:
            config: sizes.
            norm: the final norm, whose weight is the model's `norm.weight`.
            dtype: of the output matrix.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))
        # Past nn.Module's own setter, which would register the norm a second time, here.
        self.__dict__["_norm"] = norm

    @property
    def norm(self) -> RmsNorm:
        """The model's final norm."""
        norm: RmsNorm = self.__dict__["_norm"]
        return norm

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [..., vocab] fp32 of hidden [..., D]."""
        logits = F.linear(self.norm(hidden), self.weight)
        return logits.to(wide(logits.dtype))
