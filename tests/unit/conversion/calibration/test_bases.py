"""Bases of queries and keys: what each promises of the bilinear form."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.conversion.calibration.bases import BASES, balanced, copied
from kimi_convert.conversion.calibration.fold import mean_rotation, rotate_pairs
from tests.unit.conversion.calibration.teachers import TYPES, inputs, statistics


@pytest.fixture
def layer(tmp_path):
    return statistics(tmp_path, TYPES["full-q"], inputs(rows=4, length=60))


def forms(rows):
    return rows[0].mT @ rows[1]  # [H, D, D]


def second_moments(layer, rows):
    return [side @ layer.covariance @ side.mT for side in rows]


@pytest.mark.parametrize("name", BASES)
def test_every_basis_fits_the_format(layer, name):
    q, k = BASES[name](layer)
    assert q.shape == k.shape == layer.factors.q_nope.shape
    assert q.isfinite().all()
    assert k.isfinite().all()


def test_balanced_rows_of_full_rank_give_the_same_form(layer):
    factors = layer.factors
    expected = forms((factors.q_nope, factors.k_nope * layer.latent_scale))
    found = forms(balanced(layer, rope=False))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_both_sides_have_equal_diagonal_moments(layer):
    q, k = second_moments(layer, balanced(layer, rope=True))
    torch.testing.assert_close(q, k, rtol=1e-3, atol=1e-4 * q.abs().max().item())
    off = q - torch.diag_embed(q.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-3 * q.abs().max()


def test_no_form_of_that_rank_is_nearer(layer):
    """Eckart-Young, in the inputs' metric: what is left is the singular values left out."""
    factors = layer.factors
    turned = rotate_pairs(factors.q_rope, *mean_rotation(layer.lags, layer.sizes)).flatten(1, 2)
    shared = factors.k_rope.flatten(0, 1).expand(4, -1, -1)
    q = torch.cat((factors.q_nope, turned), 1)
    k = torch.cat((factors.k_nope * layer.latent_scale, shared), 1)
    values, vectors = torch.linalg.eigh(layer.covariance.double())
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    whole, found = (
        root @ form.double() @ root for form in (forms((q, k)), forms(balanced(layer, rope=True)))
    )
    left_out = torch.linalg.svdvals(whole)[:, factors.q_nope.shape[1] :]
    error = (whole - found).square().sum((1, 2)).sqrt()
    assert (left_out > 0).any()
    torch.testing.assert_close(error, left_out.square().sum(-1).sqrt(), rtol=1e-2, atol=1e-3)


def test_centred_keys_have_no_mean(layer):
    _, k = balanced(layer, rope=False, centred=True)
    mean = (k @ layer.mean).abs()
    _, plain = balanced(layer, rope=False)
    # What is left is what the constant row misses.
    assert mean.max() < 0.2 * (plain @ layer.mean).abs().max()


def test_mirrored_rows_come_in_pairs(layer):
    q, k = balanced(layer, rope=True, mirrored=True)
    half = q.shape[1] // 2
    assert torch.equal(q[:, :half], -q[:, half:])
    assert torch.equal(k[:, :half], -k[:, half:])


def test_copied_rows_are_the_factors(layer):
    q, k = copied(layer)
    assert q is layer.factors.q_nope
    assert k is layer.factors.k_nope
