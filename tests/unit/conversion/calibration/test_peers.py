"""Starts of other converters, against their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_convert.conversion.calibration import peers
from kimi_convert.conversion.calibration.gate import strongest_directions
from kimi_convert.conversion.calibration.starts import fixed_parameters
from tests.unit.conversion.calibration.fixed import planted


@pytest.fixture
def layer(tmp_path):
    return planted(tmp_path)


def attention(layer):
    """Whole attention maps [N, H, T, T]."""
    q, k, _ = layer.teacher.expanded(layer.given.x)
    logits = torch.einsum("nthd,nshd->nhts", q, k) * layer.teacher.sizes.softmax_scale
    past = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    return logits.masked_fill(~past, -torch.inf).softmax(-1)


def gate_logits(layer, parameters):
    return layer.given.x @ (parameters["kda.g_b.weight"] @ parameters["kda.g_a.weight"]).T


@pytest.mark.parametrize("method", [peers.naive, peers.kil, peers.taylor, peers.priming])
def test_projections_are_the_teachers(layer, method):
    weights, factors = method(layer.given).weights, layer.given.layer.factors
    assert torch.equal(weights.q, factors.q_nope)
    assert torch.equal(weights.k, factors.k_nope)
    assert torch.equal(weights.v, factors.v)


def test_mean_distance_is_that_of_the_attention_maps(layer):
    maps = attention(layer)
    length = maps.shape[-1]
    back = (torch.arange(length)[:, None] - torch.arange(length)).clamp_min(0)
    expected = (maps * back).sum(-1).mean((0, 2))
    # The first token's part goes by means of its attention and of its distance.
    first = (maps[..., 0] * back[:, 0]).mean((0, 2))
    by_means = layer.given.layer.sink * (length - 1) / 2
    found = peers.mean_distance(layer.given.layer)
    torch.testing.assert_close(found - by_means, expected - first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=0.2, atol=0.2)


def test_taylor_halves_at_the_mean_distance(layer):
    rates = peers.taylor(layer.given).weights.rates
    distance = peers.mean_distance(layer.given.layer)[:, None]
    torch.testing.assert_close(torch.exp(-rates * distance), torch.full_like(rates, 0.5))


def test_taylor_writes_least_where_a_head_looks_most_widely(layer):
    start = peers.taylor(layer.given)
    beta = (layer.given.x @ start.weights.beta.T).sigmoid().mean((0, 1))
    entropy = layer.given.layer.entropy
    share = (entropy - entropy.min()) / (entropy.max() - entropy.min())
    torch.testing.assert_close(beta, 0.7 - 0.4 * share, rtol=0.02, atol=0.02)


def test_taylor_gate_is_a_hundredth_of_the_values(layer):
    rows = peers.taylor(layer.given).gate_rows
    assert torch.equal(rows, 0.01 * layer.given.layer.factors.v.flatten(0, 1))


def test_priming_gate_is_half_of_both_projections(layer):
    rows = peers.priming(layer.given).gate_rows
    output, value = layer.teacher.o.weight.float().T, layer.given.layer.factors.v.flatten(0, 1)
    torch.testing.assert_close(rows, 0.5 * (output + value))


@pytest.mark.parametrize("method", [peers.taylor, peers.priming])
def test_stored_gate_is_the_nearest_that_its_directions_can_give(layer, method):
    parameters = fixed_parameters(layer.given, method)
    aim = layer.given.x @ method(layer.given).gate_rows.T
    missed = (aim - gate_logits(layer, parameters)).flatten(0, 1)
    seen = layer.given.x.flatten(0, 1) @ strongest_directions(layer.given.layer, num=16).T
    # Least squares: what is left does not correlate with what could have been used.
    correlation = seen.T @ missed / len(missed) / missed.square().mean().sqrt()
    assert correlation.abs().max() < 1e-3
    assert missed.square().mean() < aim.square().mean()


def test_draws_belong_to_the_generator(layer):
    first = peers.priming(layer.given).weights.q_taps
    assert not torch.equal(first, peers.priming(layer.given).weights.q_taps)
    layer.given.generator.manual_seed(0)
    assert torch.equal(first, peers.priming(layer.given).weights.q_taps)


def test_kil_forgets_half_in_ten_tokens(layer):
    rates = peers.kil(layer.given).weights.rates
    torch.testing.assert_close(rates, torch.full_like(rates, math.log(2) / 10))
