"""How far two computations of the same model may be apart: every bound, once, with its derivation.

All of them follow from one number per dtype, the bound on

    error(a, b) = max |a - b| / max |b|

of logits, hidden states and states. It is a bound on rounding alone: an error in the maths that
matters gives a hundred times more.

fp32. What this project promises for any depth, 1e-5. Products are summed in fp32 too, so besides
the roundings counted below every sum of n terms adds about sqrt(n) / 2 eps in whatever order it is
taken, n about 60 with the blocked sums of BLAS: four times the count below, 16 eps sqrt(L). That is
5.4e-6 for 8 layers and 9.9e-6 for the 27 of the released model. 8 layers give 2e-6. Where a fault
starts is looked for with 16 eps sqrt(l) itself, l the layers up to there: 1.9e-6 in the first.

bf16, fp16. Sums are kept in fp32 and a value is rounded where it is stored, about 16 times on its
way through a layer, each time by at most eps / 2 of its size; a weight that was rounded does the
same to a product. Roundings are independent, so L layers add up to sqrt(16 L) eps / 2 = 2 eps
sqrt(L), two runs differ by sqrt(2) times that, and the largest error stands to the largest value as
their standard deviations do: 2.8 eps sqrt(L), rounded up to 4. 8 layers give 1.1 to 1.8 eps sqrt(L).

Two runs are judged by the bound of the coarser dtype. fp64 against another dtype is judged as that
dtype; against itself nothing is compared.

What follows for logits x, y with |x - y| <= bound * max |y| = d everywhere:

    near tie     two logits of a row change places only if they are at most 2 d apart
    KL(y || x)   = log E_y exp(x - y) - E_y (x - y) <= (2 d)^2 / 8 = d^2 / 2   (Hoeffding's lemma)
    1 - cosine   <= 1 - sqrt(1 - r^2) with r the error in root mean square; r is held to twice the
                 bound of the largest error, as the logits of a row spread less than their largest
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

_FP32_BOUND = 1e-5
_FP32_FACTOR = 16.0
_HALF_FACTOR = 4.0
# KL and cosine are computed in fp64 from values near 1: what is below this is its rounding.
_FLOOR = 1e-13


def _half(dtype: torch.dtype) -> Callable[[int], float]:
    return lambda num_layers: _HALF_FACTOR * torch.finfo(dtype).eps * num_layers**0.5


_BOUNDS: Mapping[torch.dtype, Callable[[int], float]] = {
    torch.float32: lambda num_layers: _FP32_BOUND,
    torch.float16: _half(torch.float16),
    torch.bfloat16: _half(torch.bfloat16),
}
_COARSENESS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def error_bound(dtype: torch.dtype, num_layers: int) -> float:
    """Return the bound on max |difference| / max |value| of two runs, the coarser in `dtype`."""
    return _BOUNDS[torch.float32 if dtype is torch.float64 else dtype](num_layers)


def stage_bound(dtype: torch.dtype, layer_idx: int) -> float:
    """Return the bound inside a layer, counted from 0, by which the start of a fault is found."""
    layers = max(layer_idx, 0) + 1
    if dtype in (torch.float64, torch.float32):
        return min(_FP32_BOUND, _FP32_FACTOR * torch.finfo(torch.float32).eps * layers**0.5)
    return error_bound(dtype, layers)


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype with the fewest bits of precision."""
    return max(dtypes, key=_COARSENESS.index)


def tie_margin(bound: float, largest: float) -> float:
    """Return how far apart two logits may be and still change places.

    Args:
        bound: of the error, relative to the largest logit.
        largest: that logit, in size.
    """
    return 2 * bound * largest


def kl_bound(bound: float, largest: float) -> float:
    """Return the bound on a token's KL divergence in nats; arguments as `tie_margin`'s."""
    return (bound * largest) ** 2 / 2 + _FLOOR


def cosine_bound(bound: float) -> float:
    """Return the bound on 1 - cosine of two rows of logits."""
    return 1 - (1 - min(1.0, 2 * bound) ** 2) ** 0.5 + _FLOOR
