"""Scores from Gram matrices against least squares on the features themselves."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.conversion.calibration.scoring import Scores

HEADS, WIDTH = 3, 4
PENALTY = 1e-2


def planted(rows=6, length=30, outputs=5, noise=0.5):
    z = torch.randn(rows, length, HEADS * WIDTH)
    y = z @ torch.randn(HEADS * WIDTH, outputs) + noise * torch.randn(rows, length, outputs)
    return z, y


def ridge(z, y):
    z, y = z.flatten(0, 1).double(), y.flatten(0, 1).double()
    gram = z.T @ z
    return torch.linalg.solve(gram + PENALTY * torch.diag(gram.diagonal()), z.T @ y)


def two_fold_error(z, y, solutions=None):
    half = len(z) // 2
    parts = ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half)))
    left = 0.0
    for n, (fit, check) in enumerate(parts):
        w = ridge(z[fit], y[fit]) if solutions is None else solutions[n]
        left += (y[check].double() - z[check].double() @ w).square().sum().item()
    return left / y.double().square().sum().item()


def test_error_is_that_of_solving_on_one_half_and_judging_on_the_other():
    z, y = planted()
    expected = two_fold_error(z, y)
    assert Scores(z, y, num_heads=HEADS).error == pytest.approx(expected, rel=1e-4)
    other, _ = planted()
    assert Scores(other, y, num_heads=HEADS).error_of(z) == pytest.approx(expected, rel=1e-4)


def test_odd_number_of_rows_is_split_too():
    z, y = planted(rows=5)
    assert Scores(z, y, num_heads=HEADS).error == pytest.approx(two_fold_error(z, y), rel=1e-4)


def test_heads_error_is_that_of_solving_it_alone():
    z, y = planted()
    scores = Scores(z, y, num_heads=HEADS)
    candidate = torch.randn_like(z)
    head, block = 1, slice(WIDTH, 2 * WIDTH)
    half = len(z) // 2
    left = 0.0
    for fit, check in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        others = ridge(z[fit], y[fit])
        others[block] = 0
        w = ridge(candidate[fit][..., block], y[fit] - (z[fit].double() @ others).float())
        made = z[check].double() @ others + candidate[check][..., block].double() @ w
        left += (y[check].double() - made).square().sum().item()
    expected = left / y.double().square().sum().item()
    assert scores.head_error(scores.candidate(candidate), head) == pytest.approx(
        expected, rel=1e-4
    )


def test_head_is_taken_if_the_whole_error_falls():
    z, y = planted()
    broken = z.clone()
    broken[..., :WIDTH] = torch.randn_like(broken[..., :WIDTH])
    scores = Scores(broken, y, num_heads=HEADS)
    before = scores.error
    candidate = scores.candidate(z)
    assert scores.try_head(candidate, 0, least_gain=1e-4)
    assert scores.error < before
    assert scores.error == pytest.approx(two_fold_error(z, y), rel=1e-4)
    assert torch.equal(scores.z, z)


def test_head_that_does_not_help_is_left():
    z, y = planted()
    scores = Scores(z, y, num_heads=HEADS)
    before = scores.error
    candidate = scores.candidate(torch.randn_like(z))
    assert not scores.try_head(candidate, 2, least_gain=1e-4)
    assert scores.error == before
    assert torch.equal(scores.z, z)


def test_heads_that_follow_each_other_meet_the_current_ones():
    z, y = planted()
    broken = torch.randn_like(z)
    scores = Scores(broken, y, num_heads=HEADS)
    candidate = scores.candidate(z)
    for head in range(HEADS):
        scores.try_head(candidate, head, least_gain=-1.0)
    assert scores.error == pytest.approx(two_fold_error(z, y), rel=1e-4)


def test_wide_targets_are_scored_by_their_strongest_directions():
    z, _ = planted(rows=4)
    y = z @ torch.randn(HEADS * WIDTH, 400) + 1e-3 * torch.randn(4, 30, 400)
    scores = Scores(z, y, num_heads=HEADS)
    assert scores.y.shape[-1] == 256
    assert scores.error == pytest.approx(two_fold_error(z, y), abs=1e-4)


def test_solution_is_that_of_both_halves():
    z, y = planted()
    found = Scores(z, y, num_heads=HEADS).solution
    torch.testing.assert_close(found.double(), ridge(z, y), rtol=1e-3, atol=1e-4)
