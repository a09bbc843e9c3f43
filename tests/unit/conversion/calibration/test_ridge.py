"""Ridge by Gram matrices against the normal equations, written out."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.conversion.calibration.ridge import PENALTIES, fit_ridge, moments, solve
from kimi_convert.errors import CalibrationError


def problem(rows=64, features=6, outputs=3, noise=0.0):
    z = torch.randn(4, rows // 4, features)
    truth = torch.randn(features, outputs)
    return z, z @ truth + noise * torch.randn(4, rows // 4, outputs), truth


def normal_equations(z, y, penalty):
    z, y = z.double().flatten(0, 1), y.double().flatten(0, 1)
    gram = z.T @ z
    return torch.linalg.solve(gram + penalty * torch.diag(gram.diagonal()), z.T @ y)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_solution_is_that_of_the_normal_equations(penalty):
    z, y, _ = problem(noise=0.5)
    # The sums are of fp32 products; the jitter is 1e-9 of the mean power.
    torch.testing.assert_close(
        solve(moments(z, y), penalty), normal_equations(z, y, penalty), rtol=1e-5, atol=1e-5
    )


def test_planted_solution_is_found_without_noise():
    z, y, truth = problem()
    torch.testing.assert_close(solve(moments(z, y), 0.0).float(), truth, rtol=1e-4, atol=1e-4)


def test_error_is_the_squared_distance_over_the_squared_target():
    z, y, _ = problem(noise=1.0)
    w = torch.randn(6, 3, dtype=torch.float64)
    expected = ((y.double() - z.double() @ w).square().sum() / y.double().square().sum()).item()
    assert moments(z, y).error(w) == pytest.approx(expected, rel=1e-5)


def test_nearness_is_that_of_the_outputs_written_out():
    z, y, _ = problem(noise=1.0)
    w = torch.randn(6, 3, dtype=torch.float64)
    near, given, wanted = (
        moments(z, y).nearness(w),
        (z.double() @ w).flatten(),
        y.double().flatten(),
    )
    assert near.cosine == pytest.approx(torch.cosine_similarity(given, wanted, 0).item(), rel=1e-5)
    assert near.norm_ratio == pytest.approx((given.norm() / wanted.norm()).item(), rel=1e-5)
    assert near.error == moments(z, y).error(w)


def test_nearness_of_no_output_has_no_angle():
    z, y, _ = problem()
    near = moments(z, y).nearness(torch.zeros(6, 3, dtype=torch.float64))
    assert (near.error, near.cosine, near.norm_ratio) == (1.0, 0.0, 0.0)


def test_nothing_is_solved_where_nothing_is_asked():
    z = torch.randn(2, 8, 3)
    sums = moments(z, torch.zeros(2, 8, 2))
    assert sums.error(solve(sums, 1e-3)) == 0
    assert not solve(sums, 1e-3).any()


def test_feature_that_is_always_zero_gets_no_weight():
    z, y, _ = problem()
    z[..., 2] = 0
    solution = solve(moments(z, y), 1e-3)
    assert solution.isfinite().all()
    assert not solution[2].any()


def test_features_that_are_the_same_share_their_weight():
    z, y, _ = problem()
    twins = torch.cat((z, z), -1)  # singular: twelve features of rank six
    solution = solve(moments(twins, y), 1e-6)
    torch.testing.assert_close(solution[:6], solution[6:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((twins.double() @ solution).float(), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["features", "targets"])
def test_values_that_are_not_finite_are_refused(value, side):
    z, y, _ = problem()
    (z if side == "features" else y)[0, 0, 0] = value
    with pytest.raises(CalibrationError, match="no solution"):
        solve(moments(z, y), 1e-3)


def test_penalty_is_the_one_that_does_best_on_held_out_rows():
    torch.manual_seed(1)
    z, y, _ = problem(rows=80, features=16, noise=4.0)
    parts = [
        moments(z.flatten(0, 1)[n : n + 8], y.flatten(0, 1)[n : n + 8]) for n in range(0, 80, 8)
    ]
    found = fit_ridge(parts)
    held, used = parts[4] + parts[9], parts[0]
    for n in (1, 2, 3, 5, 6, 7, 8):
        used = used + parts[n]
    errors = {penalty: held.error(solve(used, penalty)) for penalty in PENALTIES}
    assert found.penalty == min(errors, key=errors.get)
    assert found.error == pytest.approx(errors[found.penalty])


def test_all_rows_take_part_in_the_solution():
    z, y, _ = problem(noise=1.0)
    parts = [moments(z[n], y[n]) for n in range(4)]
    found = fit_ridge(parts)
    expected = solve(moments(z, y), found.penalty)
    torch.testing.assert_close(found.solution.double(), expected, rtol=1e-4, atol=1e-5)
