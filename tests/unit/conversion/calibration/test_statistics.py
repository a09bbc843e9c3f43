"""Statistics of a layer against whole attention maps."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.conversion.calibration.statistics import layer_statistics
from kimi_convert.errors import CalibrationError
from tests.unit.conversion.calibration.teachers import TYPES, inputs, mla_layer

LENGTH = 150  # more than a block of queries


def whole_maps(mla, x):
    q, k, _ = mla.expanded(x)
    logits = torch.einsum("bthd,bshd->bhts", q, k) * mla.sizes.softmax_scale
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1)  # [N, H, T, T]


@pytest.fixture(params=["full-q", "low-rank-q", "yarn"])
def case(request, tmp_path):
    mla = mla_layer(tmp_path, TYPES[request.param])
    x = inputs(rows=3, length=LENGTH)
    return mla, x, layer_statistics(mla, x)


def test_moments_are_means_over_tokens(case):
    _, x, found = case
    flat = x.flatten(0, 1)
    torch.testing.assert_close(found.mean, flat.mean(0))
    torch.testing.assert_close(found.covariance, flat.T @ flat / len(flat))
    rows = torch.randn(2, 3, 32)
    torch.testing.assert_close(
        found.power(rows), (flat @ rows.flatten(0, 1).T).square().mean(0).unflatten(0, (2, 3))
    )


def test_constant_row_is_as_near_to_one_as_any(case):
    _, x, found = case
    flat = x.flatten(0, 1)
    best = torch.linalg.lstsq(flat, torch.ones(len(flat), 1)).solution[:, 0]
    least = (flat @ best - 1).square().mean().item()
    assert least <= found.constant_error < 1.1 * least + 1e-4
    assert found.constant_error == pytest.approx(
        (flat @ found.constant - 1).square().mean().item()
    )


def test_lags_sink_and_entropy_are_those_of_the_whole_maps(case):
    mla, x, found = case
    maps = whole_maps(mla, x)
    entropy = -torch.xlogy(maps, maps).sum(-1).mean((0, 2))
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sink, maps[:, :, 16:, 0].mean((0, 2)), rtol=1e-4, atol=1e-6)
    maps[..., 0] = 0
    for lag in (0, 1, 7, 140, LENGTH - 1):
        expected = maps.diagonal(-lag, 2, 3).mean((0, 2))
        torch.testing.assert_close(found.lags[:, lag], expected, rtol=1e-4, atol=1e-7)


def test_attended_rows_follow_what_tokens_receive(case):
    mla, x, found = case
    maps = whole_maps(mla, x)
    received = (maps * torch.arange(1, LENGTH + 1)[:, None]).sum(2)  # [N, H, T]
    received = (received / torch.arange(LENGTH, 0, -1)).clamp_min(1e-12).log().transpose(1, 2)
    aim = (received - received.mean((0, 1))).flatten(0, 1)
    made = x.flatten(0, 1) @ found.attended_rows.T
    # The least squares with a small penalty: no worse than nothing, by what it explains.
    explained = 1 - (aim - made).square().sum() / aim.square().sum()
    assert explained > 0.02
    gram = x.flatten(0, 1).T @ x.flatten(0, 1)
    penalty = 1e-2 * gram.diagonal().mean()
    expected = torch.linalg.solve(gram + penalty * torch.eye(32), x.flatten(0, 1).T @ aim).T
    torch.testing.assert_close(found.attended_rows, expected, rtol=1e-3, atol=1e-4)


def test_values_that_are_not_finite_are_the_teachers_fault(tmp_path):
    x = inputs()
    x[1, 2, 3] = float("inf")
    with pytest.raises(CalibrationError, match="teacher's activations"):
        layer_statistics(mla_layer(tmp_path, TYPES["full-q"]), x)
