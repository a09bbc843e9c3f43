"""Floors as KDA mixers, against what they stand for, written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kimi_convert.conversion.calibration import floors
from kimi_convert.conversion.calibration.ridge import fit_ridge, moments
from tests.unit.conversion.calibration.fixed import planted


@pytest.fixture
def layer(tmp_path):
    return planted(tmp_path)


def best_map(given):
    """The output of the best map of single tokens, by ridge on x itself."""
    parts = [moments(given.x[n], given.y[n]) for n in range(len(given.x))]
    return given.x @ fit_ridge(parts).solution


def relative(found, expected):
    return ((found - expected).square().sum() / expected.square().sum()).item()


def test_switched_off_mixer_gives_exactly_nothing(layer):
    student = layer.student(floors.ablate)
    assert not student.features(layer.given.x).any()
    assert not layer.fitted(student).any()


def test_every_feature_of_the_mean_is_the_same_number(layer):
    z = layer.student(floors.mean).features(layer.given.x)
    torch.testing.assert_close(z, torch.ones_like(z), rtol=1e-3, atol=1e-3)


def test_solved_mean_is_the_mean_output(layer):
    found = layer.fitted(layer.student(floors.mean))
    expected = layer.given.y.flatten(0, 1).mean(0).expand_as(found)
    assert relative(found, expected) < 1e-4


def test_solved_map_of_tokens_is_the_ridge_on_the_inputs(layer):
    found = layer.fitted(layer.student(floors.tokenwise))
    assert relative(found, best_map(layer.given)) < 0.01


def test_planted_map_of_tokens_is_recovered(layer):
    truth = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
    given = replace(layer.given, y=layer.given.x @ truth)
    found = replace(layer, given=given).fitted(layer.student(floors.tokenwise), given.y)
    assert relative(found, given.y) < 0.01


def test_map_of_tokens_sees_no_other_token(layer):
    student = layer.student(floors.tokenwise)
    x = layer.given.x
    other = x.clone()
    other[:, :20] = torch.randn_like(other[:, :20])
    before, after = student.features(x), student.features(other)
    assert relative(after[:, 20:], before[:, 20:]) < 1e-4
    assert relative(after[:, :20], before[:, :20]) > 0.1


def test_few_features_hold_the_nearest_map_of_their_rank(layer):
    given = layer.given
    rows = floors.map_directions(given, most=3)
    z = given.x @ rows.T
    found = z @ fit_ridge([moments(z[n], given.y[n]) for n in range(len(z))]).solution
    mapped = best_map(given).flatten(0, 1).double()
    nearest = torch.linalg.svd(mapped, full_matrices=False)
    expected = (nearest.U[:, :3] * nearest.S[:3]) @ nearest.Vh[:3]
    assert relative(found.flatten(0, 1), expected) < 0.02


def test_directions_of_a_map_have_unit_power_and_do_not_correlate(layer):
    rows = floors.map_directions(layer.given, most=8)
    covariance = layer.given.layer.covariance
    torch.testing.assert_close(rows @ covariance @ rows.T, torch.eye(8), rtol=1e-3, atol=1e-3)
