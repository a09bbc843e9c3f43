"""Feed-forward: the SwiGLU of dense layers, and a mixture of experts with shared experts.

    dense   down(silu(gate x) * up x)
    MoE     sum over chosen e of w_e expert_e(x)  +  shared(x)

Routing follows DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16): scores are a sigmoid or softmax
of the router's logits, a correction bias takes part in the choice alone, groups of experts may be
ruled out first, and the weights of the chosen are renormalised and scaled. DeepSeek-V2
(arXiv 2405.04434, section 2.2) chooses by plain scores. No tokens are dropped.

In shapes: N tokens, k choices per token, E experts, G groups, F expert hidden, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kimi_convert.config.architecture import ModelConfig, MoeConfig, Scoring, TopkMethod
from kimi_convert.model.numerics import GroupFill, Numerics, RouterWeight, wide

_RENORMALIZE_EPS = 1e-20
# Weights of one matrix of all experts, and tokens: from where on experts run all at once on a GPU.
_SMALL_EXPERTS = 1_000_000
_MANY_TOKENS = 1024
_FILL: Mapping[GroupFill, float] = {
    GroupFill.NEGATIVE_INFINITY: float("-inf"),
    GroupFill.ZERO: 0.0,
}


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, width: int, hidden: int, *, dtype: torch.dtype) -> None:
        """Allocate the weights; their values come from a checkpoint."""
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self.up = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self.down = nn.Linear(hidden, width, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., D] to [..., D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MixtureOfExperts(nn.Module):
    """Routed experts, and shared experts that see every token."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, dtype: torch.dtype) -> None:
        """Allocate the weights; their values come from a checkpoint."""
        super().__init__()
        assert config.moe is not None
        sizes, width = config.moe, config.hidden_size
        self.router = Router(config, numerics, dtype=dtype)
        self.experts = Experts(sizes, width=width, dtype=dtype)
        shared_hidden = sizes.num_shared_experts * sizes.intermediate_size
        self.shared = Mlp(width, shared_hidden, dtype=dtype) if shared_hidden else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [B, T, D], normalised, to [B, T, D]."""
        tokens = x.flatten(0, -2)  # [N, D]
        routed = self.experts(tokens, self.router(tokens)).view_as(x)
        return routed if self.shared is None else routed + self.shared(x)


class Routing(NamedTuple):
    """The experts of each token and the factors on their outputs."""

    weights: torch.Tensor  # [N, k] fp32
    experts: torch.Tensor  # [N, k] int64


class Router(nn.Module):
    """Chooses k experts per token. Weights, logits and scores are fp32."""

    def __init__(self, config: ModelConfig, numerics: Numerics, *, dtype: torch.dtype) -> None:
        """Allocate the weights; their values come from a checkpoint."""
        super().__init__()
        assert config.moe is not None
        self.sizes = config.moe
        self.numerics = numerics
        count = config.moe.num_experts
        self.weight = nn.Parameter(torch.empty(count, config.hidden_size, dtype=wide(dtype)))
        # Every kimi_linear checkpoint has the correction bias, whatever its top-k method.
        biased = config.moe.has_correction_bias or config.model_type == "kimi_linear"
        self.bias = nn.Parameter(torch.empty(count, dtype=wide(dtype))) if biased else None

    def forward(self, tokens: torch.Tensor) -> Routing:
        """Route tokens [N, D]."""
        scores, biased = self.scores(tokens)
        experts = self._choose(biased)  # [N, k]
        by_bias = self.numerics.router_weight is RouterWeight.BIASED
        weights = (biased if by_bias else scores).gather(1, experts)
        if self.sizes.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + _RENORMALIZE_EPS)
        return Routing(weights * self.sizes.routed_scaling_factor, experts)

    def scores(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every expert's score [N, E] for tokens [N, D], without and with the bias."""
        precision = self.numerics.router.resolve(tokens.dtype)
        with _not_rounded(tokens.device):
            logits = F.linear(tokens.to(precision), self.weight.to(precision))
        logits = logits.to(self.weight.dtype)
        scores = _SCORES[self.sizes.scoring](logits)
        return scores, scores if self.bias is None else scores + self.bias

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        sizes = self.sizes
        if sizes.num_groups > 1 and sizes.topk_method in _GROUP_SCORES:
            groups = scores.unflatten(1, (sizes.num_groups, -1))  # [N, G, E / G]
            best = _GROUP_SCORES[sizes.topk_method](groups).topk(sizes.topk_groups, -1).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, value=True)
            fill = _FILL[self.numerics.group_fill]
            scores = groups.masked_fill(~kept[..., None], fill).flatten(1)
        return scores.topk(sizes.num_experts_per_token, -1).indices


class Experts(nn.Module):
    """All routed experts of a layer, stacked: each is one SwiGLU."""

    def __init__(self, sizes: MoeConfig, *, width: int, dtype: torch.dtype) -> None:
        """Allocate the weights; their values come from a checkpoint."""
        super().__init__()
        count, hidden = sizes.num_experts, sizes.intermediate_size
        self.gate = nn.Parameter(torch.empty(count, hidden, width, dtype=dtype))
        self.up = nn.Parameter(torch.empty(count, hidden, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(count, width, hidden, dtype=dtype))

    def forward(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Choices are sorted by expert, so that each chosen expert runs once, over its tokens alone,
        and an expert that no token chose costs nothing. The sum is fp32. On a GPU, experts so small
        that to launch them takes longer than to run them all run on all tokens.

        Args:
            tokens: [N, D].
            routing: of the N tokens.

        Returns:
            [N, D] in the dtype of `tokens`.
        """
        if self.runs_all(len(tokens), tokens.device):
            return self.run_all(tokens, routing)
        chosen = routing.experts.flatten()  # [N k]
        order = chosen.argsort(stable=True)
        weights = routing.weights.flatten()[order, None]  # [N k, 1]
        rows = order // routing.experts.shape[1]  # the token of each choice
        loads = chosen.bincount(minlength=len(self.gate)).tolist()
        total = torch.zeros_like(tokens, dtype=wide(tokens.dtype))
        # Cut apart once: each expert taken alone has a gradient of the size of all.
        experts = zip(self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True)
        parts = zip(rows.split(loads), weights.split(loads), experts, strict=True)
        for row, weight, expert in parts:
            if len(row):
                # A token is in a part at most once, so the order of additions is fixed.
                total.index_add_(0, row, _swiglu(tokens[row], *expert) * weight)
        return total.to(tokens.dtype)

    def runs_all(self, num_tokens: int, device: torch.device) -> bool:
        """Say whether all experts run on so many tokens: then what is launched is always the same."""
        small = self.gate.numel() <= _SMALL_EXPERTS and num_tokens >= _MANY_TOKENS
        return small and device.type == "cuda"

    def run_all(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return the same as `forward`, with every expert run on every token, without a wait."""
        count, hidden, _ = self.gate.shape
        weights = torch.zeros(
            len(tokens), count, dtype=routing.weights.dtype, device=tokens.device
        )
        weights = weights.scatter(
            1, routing.experts, routing.weights
        )  # [N, E], 0 where not chosen
        gate = F.linear(tokens, self.gate.flatten(0, 1))  # [N, E F]
        inner = F.silu(gate) * F.linear(tokens, self.up.flatten(0, 1))
        inner = inner.unflatten(1, (count, hidden)) * weights.to(inner.dtype).unsqueeze(-1)
        down = self.down.transpose(1, 2).flatten(0, 1)  # [E F, D]
        return (inner.flatten(1) @ down).to(tokens.dtype)


def _swiglu(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Run one expert, [F, D] twice and [D, F], on x [N, D]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _not_rounded(device: torch.device) -> AbstractContextManager[object]:
    """Keep a training in bf16 from rounding what chooses experts."""
    return torch.autocast("cuda", enabled=False) if device.type == "cuda" else nullcontext()


def _two_best(groups: torch.Tensor) -> torch.Tensor:
    return groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)


def _best(groups: torch.Tensor) -> torch.Tensor:
    return groups.amax(-1)


_SCORES: Mapping[Scoring, Callable[[torch.Tensor], torch.Tensor]] = {
    Scoring.SIGMOID: torch.sigmoid,
    Scoring.SOFTMAX: lambda logits: logits.softmax(-1),
}
# How a group of experts [N, G, E / G] is scored; methods that are not here ignore groups.
_GROUP_SCORES: Mapping[TopkMethod, Callable[[torch.Tensor], torch.Tensor]] = {
    TopkMethod.NOAUX_TC: _two_best,
    TopkMethod.GROUP_LIMITED_GREEDY: _best,
}
