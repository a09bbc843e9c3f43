"""The two gate laws of KDA: from the gate projection to the log decay g.

Both give a natural-log decay <= 0 for every token, head and key channel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.checks import expect, expect_precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A gate law with its parameters, for kernels that compute the log decay themselves."""

    A_log: Tensor  # [H], natural log of the decay rate, or of the slope where bounded
    dt_bias: Tensor  # [H, K], added to the gate's projection
    lower_bound: float | None = None  # natural log, < 0: `bounded_gate`; None: `softplus_gate`

    def __post_init__(self) -> None:
        """Refuse a bound that is not below 0."""
        if self.lower_bound is not None:
            _check_lower_bound("Gate", self.lower_bound)

    def log_decay(self, f: Tensor) -> Tensor:
        """Return g [B, T, H, K] of the gate's projection f, in torch."""
        if self.lower_bound is None:
            return softplus_gate(f, self.A_log, self.dt_bias)
        return bounded_gate(f, self.A_log, self.dt_bias, lower_bound=self.lower_bound)


def softplus_gate(f: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Compute g = -exp(A_log) * softplus(f + dt_bias), the law of Kimi-Linear.

    Args:
        f: [B, T, H, K] bf16 | fp16 | fp32. Output of the gate projection, without bias.
        A_log: [H]. Natural log of the decay rate.
        dt_bias: [H, K]. Added to f.

    Returns:
        g: [B, T, H, K] fp32 (fp64 for fp64 inputs), natural log, in (-inf, 0].

    Raises:
        KernelInputError: A shape, dtype or device does not fit.

    Source: Kimi Linear report, arXiv 2510.26692, section 3; softplus(x) = x above 20.
    """
    shifted, rate = _shifted_and_rate("softplus_gate", f, A_log, dt_bias)
    return -rate * softplus(shifted, threshold=20.0)


def bounded_gate(f: Tensor, A_log: Tensor, dt_bias: Tensor, *, lower_bound: float) -> Tensor:
    """Compute g = L * sigmoid(exp(A_log) * (f + dt_bias)) with L = lower_bound.

    L scales the sigmoid, it is not a clamp. A_log means something else than in
    `softplus_gate`: here it is the log slope of the sigmoid.

    Args:
        f: [B, T, H, K] bf16 | fp16 | fp32. Output of the gate projection, without bias.
        A_log: [H]. Natural log of the slope.
        dt_bias: [H, K]. Added to f.
        lower_bound: Smallest natural-log decay, below 0; released models have -5.

    Returns:
        g: [B, T, H, K] fp32 (fp64 for fp64 inputs), natural log, in [lower_bound, 0].

    Raises:
        KernelInputError: A shape, dtype or device does not fit, or lower_bound is not below 0.

    Source: `kda_gate` with `lower_bound` in flash-linear-attention (pull request 703).
    """
    _check_lower_bound("bounded_gate", lower_bound)
    shifted, slope = _shifted_and_rate("bounded_gate", f, A_log, dt_bias)
    return lower_bound * (slope * shifted).sigmoid()


def _shifted_and_rate(
    where: str, f: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return f + dt_bias [B, T, H, K] and exp(A_log) [H, 1] in the dtype to compute in."""
    expect(where, f=(f, "B T H K"), A_log=(A_log, "H"), dt_bias=(dt_bias, "H K"))
    dtype = expect_precision(where, f=f, A_log=A_log, dt_bias=dt_bias)
    return f.to(dtype) + dt_bias.to(dtype), A_log.to(dtype).exp().unsqueeze(-1)


def _check_lower_bound(where: str, lower_bound: float) -> None:
    if not lower_bound < 0:
        raise KernelInputError(
            "lower_bound is not below 0",
            where=where,
            expected="a natural-log decay below 0",
            found=lower_bound,
            hint="Pass the lower bound of the log decay, for example -5.0.",
        )
