"""Kimi Delta Attention: arXiv 2510.26692, sections 3 (equation 1) and 4.

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))   causal, depthwise
    q, k    = q / |q|, k / |k|                                          per head
    g       = -exp(A_log) softplus(W_fb W_fa x + dt_bias)               log decay per key channel
    beta    = sigmoid(W_b x)                                            write strength per head
    S_t     = (I - beta k k^T) diag(exp g) S_{t-1} + beta k v^T,  o = K^-1/2 S_t^T q
    y       = W_o (norm(o) * sigmoid(W_gb W_ga x))                      norm per head, then gate

Gate, beta, unit norm, state and output norm are fp32. The arithmetic is `kimi_convert.kernels`'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

import torch
from torch import nn

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.kernels.kda import chunk_kda, recurrent_kda, softplus_gate
from kimi_convert.kernels.norm import gated_rms_norm, l2_norm
from kimi_convert.kernels.short_conv import short_conv
from kimi_convert.model.cache import KdaCache
from kimi_convert.model.numerics import Numerics, QkNorm, wide

_UNIT_NORM_EPS = 1e-6


class KdaForm(StrEnum):
    """Which of the two equivalent forms of the recurrence runs."""

    AUTO = "auto"  # recurrent for few tokens, chunk for many
    CHUNK = "chunk"
    RECURRENT = "recurrent"


class KimiDeltaAttention(nn.Module):
    """The linear-attention mixer of Kimi-Linear."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, dtype: torch.dtype) -> None:
        """Allocate the weights; their values come from a checkpoint."""
        super().__init__()
        assert config.kda is not None
        sizes, width = config.kda, config.hidden_size
        inner = sizes.num_heads * sizes.head_dim  # P
        self.num_heads = sizes.num_heads
        self.numerics = numerics
        self.rms_norm_eps = config.rms_norm_eps
        self.q = nn.Linear(width, inner, bias=False, dtype=dtype)
        self.k = nn.Linear(width, inner, bias=False, dtype=dtype)
        self.v = nn.Linear(width, inner, bias=False, dtype=dtype)
        self.q_conv = ShortConv(inner, sizes.conv_size, dtype=dtype)
        self.k_conv = ShortConv(inner, sizes.conv_size, dtype=dtype)
        self.v_conv = ShortConv(inner, sizes.conv_size, dtype=dtype)
        precise = numerics.decay_parameters.resolve(dtype)
        self.A_log = nn.Parameter(torch.empty(1, 1, sizes.num_heads, 1, dtype=precise))
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=precise))
        self.f_a = nn.Linear(width, sizes.head_dim, bias=False, dtype=dtype)
        self.f_b = nn.Linear(sizes.head_dim, inner, bias=False, dtype=dtype)
        self.b = nn.Linear(width, sizes.num_heads, bias=False, dtype=dtype)
        self.g_a = nn.Linear(width, sizes.head_dim, bias=False, dtype=dtype)
        self.g_b = nn.Linear(sizes.head_dim, inner, bias=False, dtype=dtype)
        self.o_norm = OutputNorm(config, numerics, dtype=dtype)
        self.o = nn.Linear(inner, width, bias=False, dtype=dtype)

    def forward(
        self, x: torch.Tensor, cache: KdaCache | None = None, *, form: KdaForm = KdaForm.AUTO
    ) -> torch.Tensor:
        """Mix tokens; with a cache, after those that it has seen.

        Args:
            x: [B, T, D], normalised.
            cache: continued from and updated in place.
            form: how the recurrence is computed.

        Returns:
            [B, T, D], before the residual addition.
        """
        past = KdaCache() if cache is None else cache
        q, q_conv = self.q_conv(self.q(x), past.q_conv)  # [B, T, P], [B, P, W - 1]
        k, k_conv = self.k_conv(self.k(x), past.k_conv)
        v, v_conv = self.v_conv(self.v(x), past.v_conv)
        mixed, state = _FORMS[_resolve(form, num_tokens=x.shape[1])](
            self._unit(self._heads(q)),  # [B, T, H, K]
            self._unit(self._heads(k)),
            self._heads(v),  # [B, T, H, V]
            self._log_decay(x),  # [B, T, H, K]
            self._write_strength(x),  # [B, T, H]
            initial_state=past.state,
        )
        if cache is not None:
            cache.state = state.detach()
            cache.q_conv = q_conv.detach()
            cache.k_conv = k_conv.detach()
            cache.v_conv = v_conv.detach()
        gate = self._heads(self.g_b(self.g_a(x)))
        return self.o(self.o_norm(mixed, gate).flatten(2))  # [B, T, H, V] -> [B, T, D]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # [B, T, P] -> [B, T, H, K]

    def _log_decay(self, x: torch.Tensor) -> torch.Tensor:
        f = self._heads(self.f_b(self.f_a(x)))
        return softplus_gate(
            f, self.A_log.flatten(), self.dt_bias.unflatten(0, (self.num_heads, -1))
        )

    def _write_strength(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x).to(self.numerics.beta.resolve(x.dtype)).sigmoid()

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(wide(x.dtype))
        match self.numerics.qk_norm:
            case QkNorm.SUM_EPS:
                return l2_norm(x, eps=_UNIT_NORM_EPS)
            case QkNorm.MEAN_EPS:
                return l2_norm(x, eps=_UNIT_NORM_EPS * x.shape[-1])
            case QkNorm.FLOOR:
                return x / x.norm(dim=-1, keepdim=True).clamp_min(self.rms_norm_eps)


class ShortConv(nn.Module):
    """Causal depthwise convolution of width W, then SiLU; tap W - 1 meets the current token."""

    def __init__(self, channels: int, width: int, *, dtype: torch.dtype) -> None:
        """Allocate the taps; their values come from a checkpoint."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width, dtype=dtype))

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [B, T, P] and the inputs [B, P, W - 1] that the next tokens need."""
        return short_conv(x, self.weight, state=past)


class OutputNorm(nn.Module):
    """norm(o) * weight * sigmoid(gate) per head, rounded once."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, dtype: torch.dtype) -> None:
        """Allocate the weight, which all heads share."""
        super().__init__()
        assert config.kda is not None
        eps = numerics.o_norm_eps
        self.eps = config.rms_norm_eps if eps is None else eps
        self.weight = nn.Parameter(torch.empty(config.kda.head_dim, dtype=dtype))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Normalise and gate x [B, T, H, V]."""
        return gated_rms_norm(x, gate, self.weight, eps=self.eps)


_Recurrence = Callable[..., tuple[torch.Tensor, torch.Tensor]]
_FORMS: Mapping[KdaForm, _Recurrence] = {
    KdaForm.CHUNK: chunk_kda,
    KdaForm.RECURRENT: recurrent_kda,
}
# One CPU thread, 16 heads of 128: both forms take 0.5 ms at 4 tokens, 1.3 against 2.2 ms at 16.
_RECURRENT_TOKENS = 4


def _resolve(form: KdaForm, *, num_tokens: int) -> KdaForm:
    if form is not KdaForm.AUTO:
        return form
    return KdaForm.RECURRENT if num_tokens <= _RECURRENT_TOKENS else KdaForm.CHUNK
