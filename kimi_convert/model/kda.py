"""Kimi Delta Attention: arXiv 2510.26692, sections 3 (equation 1) and 4.

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))   causal, depthwise
    q, k    = q / |q|, k / |k|                                          per head
    g       = -exp(A_log) softplus(W_fb W_fa x + dt_bias)               log decay per key channel
    beta    = sigmoid(W_b x)                                            write strength per head
    S_t     = (I - beta k k^T) diag(exp g) S_{t-1} + beta k v^T,  o = K^-1/2 S_t^T q
    y       = W_o (norm(o) * sigmoid(W_gb W_ga x))                      norm per head, then gate

Ling-3 has one matrix W_f for W_fb W_fa, one W_g for W_gb W_ga, and a bounded decay
g = L sigmoid(exp(A_log) (W_f x + dt_bias)) with L = -5.

Gate, beta, unit norm, state and output norm are fp32. The arithmetic is `kimi_convert.kernels`',
which fuse what stands between the projections as far as the chosen numerics allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

import torch
from torch import nn

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.kernels.backend import Backend, resolve_backend
from kimi_convert.kernels.kda import Gate, chunk_kda, recurrent_kda
from kimi_convert.kernels.kda.mixer_step import kda_mixer_step_
from kimi_convert.kernels.norm import gated_rms_norm, l2_norm
from kimi_convert.kernels.short_conv import short_conv_qkv
from kimi_convert.model.backend import KernelModule
from kimi_convert.model.cache import KdaCache
from kimi_convert.model.numerics import Numerics, Precision, QkNorm, wide

_UNIT_NORM_EPS = 1e-6


class KdaForm(StrEnum):
    """Which of the two equivalent forms of the recurrence runs."""

    AUTO = "auto"  # recurrent for few tokens, chunk for many
    CHUNK = "chunk"
    RECURRENT = "recurrent"


class KimiDeltaAttention(KernelModule):
    """The linear-attention mixer of Kimi-Linear and of Ling-3."""

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
        heads = sizes.num_heads
        # Shapes as the two formats store them.
        shape = (heads,) if sizes.full_rank_gates else (1, 1, heads, 1)
        self.A_log = nn.Parameter(torch.empty(shape, dtype=precise))
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=precise))
        self.b = nn.Linear(width, heads, bias=False, dtype=dtype)
        self.lower_bound = sizes.lower_bound
        self.full_rank_gates = sizes.full_rank_gates
        if sizes.full_rank_gates:
            self.f = nn.Linear(width, inner, bias=False, dtype=dtype)
            self.g = nn.Linear(width, inner, bias=False, dtype=dtype)
        else:
            self.f_a = nn.Linear(width, sizes.head_dim, bias=False, dtype=dtype)
            self.f_b = nn.Linear(sizes.head_dim, inner, bias=False, dtype=dtype)
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
        form = self._resolve(form, x)
        if cache is not None and self._takes_step(x, cache, form):
            return self.o(self._step(x, cache))
        past = KdaCache() if cache is None else cache
        convolved, (q_conv, k_conv, v_conv) = short_conv_qkv(
            (self.q(x), self.k(x), self.v(x)),  # [B, T, P]
            self._conv_weights(),
            states=(past.q_conv, past.k_conv, past.v_conv),  # [B, P, W - 1]
            backend=self.backend,
        )
        q, k, v = (self._heads(y) for y in convolved)  # [B, T, H, K | V]
        beta = self.b(x)  # [B, T, H]
        mixed, state = _FORMS[form](
            q if self._norm_is_fused else self._unit(q),
            k if self._norm_is_fused else self._unit(k),
            v,
            self._heads(self._decay_logits(x)),  # [B, T, H, K]
            beta if self._sigmoid_is_fused else beta.sigmoid(),
            gate=self.gate_law(),
            qk_norm=self._norm_is_fused,
            beta_logits=self._sigmoid_is_fused,
            initial_state=past.state,
            backend=self.backend,
        )
        if cache is not None:
            cache.state = state.detach()
            cache.q_conv = q_conv.detach()
            cache.k_conv = k_conv.detach()
            cache.v_conv = v_conv.detach()
        gate = self._heads(self._gate_logits(x))
        return self.o(self.o_norm(mixed, gate).flatten(2))  # [B, T, H, V] -> [B, T, D]

    def _takes_step(self, x: torch.Tensor, cache: KdaCache, form: KdaForm) -> bool:
        """Say whether one launch can take the mixer one token further, over the cache's states."""
        return (
            x.shape[1] == 1
            and form is KdaForm.RECURRENT
            and cache.state is not None
            and self._norm_is_fused
            and self._sigmoid_is_fused
            and self._runs_on(x) is Backend.TRITON
            and not self._needs_grad(x)
        )

    def _step(self, x: torch.Tensor, cache: KdaCache) -> torch.Tensor:
        """Return what the output matrix reads [B, 1, P], and write over the cache's states."""
        assert cache.state is not None
        assert cache.q_conv is not None
        assert cache.k_conv is not None
        assert cache.v_conv is not None
        x = x[:, 0]  # [B, D]
        mixed = kda_mixer_step_(
            self.q(x),
            self.k(x),
            self.v(x),
            self._decay_logits(x),
            self.b(x),
            output_gate=self._gate_logits(x),
            conv_weights=self._conv_weights(),
            conv_states=(cache.q_conv, cache.k_conv, cache.v_conv),
            state=cache.state,
            gate=self.gate_law(),
            norm_weight=self.o_norm.weight,
            norm_eps=self.o_norm.eps,
            backend=self.backend,
        )
        return mixed.unsqueeze(1)

    @property
    def _norm_is_fused(self) -> bool:
        """Whether the kernels' unit norm is the one that was chosen."""
        return self.numerics.qk_norm is QkNorm.SUM_EPS

    @property
    def _sigmoid_is_fused(self) -> bool:
        """Whether the kernels' sigmoid of beta, in fp32, is the one that was chosen."""
        return self.numerics.beta is Precision.FP32

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # [B, T, P] -> [B, T, H, K]

    def gate_law(self) -> Gate:
        """Return the law of the decay with this layer's parameters."""
        return Gate(
            A_log=self.A_log.flatten(),
            dt_bias=self.dt_bias.unflatten(0, (self.num_heads, -1)),
            lower_bound=self.lower_bound,
        )

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """Return the natural log of the decay [B, T, H, K] on inputs x [B, T, D], in torch."""
        return self.gate_law().log_decay(self._heads(self._decay_logits(x)))

    def _decay_logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(x) if self.full_rank_gates else self.f_b(self.f_a(x))  # [..., P]

    def _gate_logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.g(x) if self.full_rank_gates else self.g_b(self.g_a(x))  # [..., P]

    def _conv_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q_conv.weight, self.k_conv.weight, self.v_conv.weight

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        """Bring x [..., K] to unit length where the kernels do it in another way."""
        x = x.to(wide(x.dtype))
        if self.numerics.qk_norm is QkNorm.MEAN_EPS:
            return l2_norm(x, eps=_UNIT_NORM_EPS * x.shape[-1], backend=self.backend)
        return x / x.norm(dim=-1, keepdim=True).clamp_min(self.rms_norm_eps)

    def _runs_on(self, x: torch.Tensor) -> Backend:
        return resolve_backend(
            self.backend, where="KimiDeltaAttention", device=x.device, dtype=x.dtype
        )

    def _needs_grad(self, x: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and (
            x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        )

    def _resolve(self, form: KdaForm, x: torch.Tensor) -> KdaForm:
        if form is not KdaForm.AUTO:
            return form
        if x.shape[1] > _RECURRENT_TOKENS:
            return KdaForm.CHUNK
        # The recurrent kernel has no gradients.
        differentiates = self._needs_grad(x) and self._runs_on(x) is Backend.TRITON
        return KdaForm.CHUNK if differentiates else KdaForm.RECURRENT


class ShortConv(nn.Module):
    """Taps of a causal depthwise convolution before SiLU; tap W - 1 meets the current token.

    All three of a mixer run at once: see `short_conv_qkv`.
    """

    def __init__(self, channels: int, width: int, *, dtype: torch.dtype) -> None:
        """Allocate the taps; their values come from a checkpoint."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width, dtype=dtype))


class OutputNorm(KernelModule):
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
        return gated_rms_norm(x, gate, self.weight, eps=self.eps, backend=self.backend)


_Recurrence = Callable[..., tuple[torch.Tensor, torch.Tensor]]
_FORMS: Mapping[KdaForm, _Recurrence] = {
    KdaForm.CHUNK: chunk_kda,
    KdaForm.RECURRENT: recurrent_kda,
}
# One CPU thread, 16 heads of 128: both forms take 0.5 ms at 4 tokens, 1.3 against 2.2 ms at 16.
_RECURRENT_TOKENS = 4
