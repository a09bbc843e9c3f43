"""Folded queries against the expectation of the rotated logits, written out."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.conversion.calibration.factors import as_pairs, from_pairs, mla_factors
from kimi_convert.conversion.calibration.fold import fold_query
from kimi_convert.model.rope import rotate, rotation_at
from tests.unit.conversion.calibration.teachers import TYPES, inputs, mla_layer


@pytest.fixture(params=TYPES, ids=str)
def mla(request, tmp_path):
    return mla_layer(tmp_path, TYPES[request.param])


def query_of(mla):
    return mla.q.weight if mla.sizes.q_lora_rank is None else mla.q_b.weight


def heads_of(rows, sizes):
    """Random queries [H, n + r] from rows, and what the layer's softmax multiplies."""
    x = torch.randn(rows.shape[1])
    return (rows @ x).unflatten(0, (sizes.num_heads, -1)), x


def test_folded_logits_are_the_mean_of_the_rotated_ones(mla):
    sizes = mla.sizes
    lags = torch.rand(sizes.num_heads, 6)
    folded = fold_query(query_of(mla), lags, sizes)
    q, x = heads_of(query_of(mla).detach(), sizes)
    key = torch.randn(sizes.num_heads, sizes.qk_head_dim)
    n = sizes.qk_nope_head_dim
    expected = torch.zeros(sizes.num_heads)
    for lag in range(6):
        at_query = rotation_at(sizes.rope, torch.tensor([lag]), dim=sizes.qk_rope_head_dim)
        at_key = rotation_at(sizes.rope, torch.tensor([0]), dim=sizes.qk_rope_head_dim)
        turned, shared = (
            rotate(part[None, None, :, n:], at, interleaved=sizes.rope.interleaved)[0, 0]
            for part, at in ((q, at_query), (key, at_key))
        )
        logit = (q[:, :n] * key[:, :n]).sum(-1) + (turned * shared).sum(-1)
        expected += lags[:, lag] / lags.sum(-1) * logit * sizes.softmax_scale
    found = ((folded @ x).unflatten(0, (sizes.num_heads, -1)) * key).sum(-1)
    # Kimi-Linear's softmax has no factor but the width's.
    found = found * sizes.qk_head_dim**-0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_head_that_looks_at_the_same_token_alone_keeps_its_query(mla):
    sizes = mla.sizes
    lags = torch.zeros(sizes.num_heads, 5)
    lags[:, 0] = 3
    factor = sizes.softmax_scale * sizes.qk_head_dim**0.5
    folded = fold_query(query_of(mla), lags, sizes).unflatten(0, (sizes.num_heads, -1))
    plain = query_of(mla).unflatten(0, (sizes.num_heads, -1)) * factor
    nope = sizes.qk_nope_head_dim
    torch.testing.assert_close(folded[:, :nope], plain[:, :nope])
    turned = sizes.rope.yarn.rotation_factor**2 if sizes.rope.yarn else 1
    torch.testing.assert_close(folded[:, nope:], plain[:, nope:] * turned)


def test_distances_that_average_out_leave_nothing_of_fast_pairs(mla):
    sizes = mla.sizes
    lags = torch.ones(sizes.num_heads, 2000)
    folded = fold_query(query_of(mla), lags, sizes).unflatten(0, (sizes.num_heads, -1))
    pairs = as_pairs(folded[:, sizes.qk_nope_head_dim :], sizes, dim=1)
    before = query_of(mla).unflatten(0, (sizes.num_heads, -1))[:, sizes.qk_nope_head_dim :]
    # The fastest pair turns by 1 a token: the mean of 2000 such turns is at most 1 / sin(1/2) / 2000.
    share = pairs[:, 0].norm() / as_pairs(before, sizes, dim=1)[:, 0].norm()
    assert share < 2 * sizes.softmax_scale * sizes.qk_head_dim**0.5 / (2000 * 0.479)


def test_pairs_come_back(mla):
    rows = torch.randn(3, mla.sizes.qk_rope_head_dim, 5)
    pairs = as_pairs(rows, mla.sizes, dim=1)
    assert pairs.shape == (3, mla.sizes.qk_rope_head_dim // 2, 2, 5)
    assert torch.equal(from_pairs(pairs, mla.sizes, dim=1), rows)


def test_factors_give_the_layers_own_queries_keys_and_values_up_to_a_factor_per_token(mla):
    x = inputs(rows=1, length=1)  # position 0: nothing is rotated
    q, k, v = (part[0, 0] for part in mla.expanded(x))  # [H, ...]
    factors, nope = mla_factors(mla), mla.sizes.qk_nope_head_dim
    token = x[0, 0]
    for rows, expected in (
        (factors.q_nope, q[:, :nope]),
        (factors.k_nope, k[:, :nope]),
        (factors.v, v),
    ):
        made = rows @ token
        factor = (made * expected).sum() / made.square().sum()
        assert factor > 0
        torch.testing.assert_close(made * factor, expected, rtol=1e-4, atol=1e-5)
