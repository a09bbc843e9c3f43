"""Starts that a KDA mixer must beat: no output, the mean output, a map of single tokens.

Each is a KDA mixer, so that a floor is a checkpoint like every other start and goes through the
same later stages. Exact but for what is said below; the output matrix is solved for all alike.

* `ablate`: values of 0. No later stage changes it: values and output matrix would have to move
  together, and the gradient of each is 0 while the other is.
* `mean`: every value, key and query is the row that is 1 on all inputs, so the state is a mean of
  ones and the output norm leaves 1. As constant as that row is.
* `tokenwise`: queries are keys and the write strength is 1, so a token reads the value that it has
  just written, v_t (k_t . k_t). Values are so small that SiLU halves them and the output norm
  divides by sqrt(eps): both act as constants, and z is linear in x.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from kimi_convert.conversion.calibration.fixed_start import (
    FixedStart,
    LayerGiven,
    teachers_projections,
)
from kimi_convert.conversion.calibration.mixer import KdaWeights
from kimi_convert.conversion.calibration.ridge import fit_ridge, moments
from kimi_convert.conversion.calibration.streams import groups

_LARGE = 8.0  # before SiLU: passed as it is
_SATURATED = 20.0  # a logit whose sigmoid is 1
_SLOW, _FAST = 0.0, 100.0  # rates; clamped to what the format holds
_NORM_SHARE = 0.01  # mean square of a head's output, in units of the norm's eps
_POWER_FLOOR = 1e-6  # of the strongest direction's


def ablate(given: LayerGiven) -> FixedStart:
    """Write nothing."""
    weights = _copied(given)
    return FixedStart(weights=replace(weights, v=torch.zeros_like(weights.v)))


def mean(given: LayerGiven) -> FixedStart:
    """Give 1 in every feature."""
    copied = _copied(given)
    constant = given.layer.constant
    tap = _LARGE / given.conv_size
    weights = replace(
        copied,
        q=constant.expand_as(copied.q),
        k=constant.expand_as(copied.k),
        v=constant.expand_as(copied.v),
        q_taps=torch.full_like(copied.q_taps, tap),
        k_taps=torch.full_like(copied.k_taps, tap),
        v_taps=torch.full_like(copied.v_taps, tap),
        rates=torch.full_like(copied.rates, _SLOW),
    )
    return FixedStart(weights=weights)


def tokenwise(given: LayerGiven) -> FixedStart:
    """Give the directions of x that y = B x is made of."""
    copied = _copied(given)
    heads, value_dim, width = copied.v.shape
    key_dim = copied.k.shape[1]
    rows = map_directions(given, most=heads * value_dim)
    padded = rows.new_zeros(heads * value_dim, width)
    padded[: len(rows)] = rows
    # After SiLU and the read, v / (2 sqrt(K)): its mean square is the share of eps.
    gain = 2 * math.sqrt(_NORM_SHARE * given.rms_norm_eps * key_dim)
    weights = replace(
        copied,
        q=copied.k,
        q_taps=copied.k_taps,
        v=padded.unflatten(0, (heads, value_dim)),
        v_taps=gain * copied.v_taps,
        rates=torch.full_like(copied.rates, _FAST),
        beta=(_SATURATED * given.layer.constant).expand_as(copied.beta),
    )
    return FixedStart(weights=weights)


def map_directions(given: LayerGiven, *, most: int) -> torch.Tensor:
    """Return rows [n, D] of unit power on x, n at most `most`, that the best map is made of.

    With y ~ B x by ridge and C = E[x x'], the singular vectors of C^1/2 B' in the metric of x: the
    first n give the map of rank n that is nearest in mean square.
    """
    parts = [moments(given.x[rows], given.y[rows]) for rows in groups(len(given.x))]
    solution = fit_ridge(parts).solution.double()  # [D, D], x @ solution ~ y
    values, vectors = torch.linalg.eigh(given.layer.covariance.double())
    root = values.clamp_min(_POWER_FLOOR * float(values[-1])).sqrt()
    left = torch.linalg.svd((vectors * root).T @ solution).U
    return ((vectors / root) @ left[:, :most]).T.float().contiguous()


def _copied(given: LayerGiven) -> KdaWeights:
    """Return the teacher's projections, taps of 1, no dynamics."""
    factors = given.layer.factors
    heads, _, width = factors.q_nope.shape
    return teachers_projections(
        given,
        rates=factors.q_nope.new_full(factors.q_nope.shape[:2], _SLOW),
        beta=factors.v.new_zeros(heads, width),
    )
