"""Mixers while they are chosen: the same numbers as the reference model's module."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.calibration.gate import strongest_directions
from kimi_convert.conversion.calibration.mixer import KdaWeights, MixerRun, to_parameters
from kimi_convert.conversion.calibration.moves import MOVES, starting_point
from kimi_convert.conversion.calibration.students import KdaStudent
from kimi_convert.conversion.target import target_config
from tests.unit.conversion.calibration.teachers import TYPES, inputs, statistics

CONFIG = target_config(TYPES["full-q"], Recipe())


@pytest.fixture
def x():
    return inputs(rows=3, length=50)


@pytest.fixture
def layer(tmp_path, x):
    return statistics(tmp_path, TYPES["full-q"], x)


def random_weights(directions):
    heads, key, width, taps = 4, 16, 32, 4
    return KdaWeights(
        q=torch.randn(heads, key, width),
        k=torch.randn(heads, key, width),
        v=torch.randn(heads, key, width),
        q_taps=torch.randn(heads, key, taps),
        k_taps=torch.randn(heads, key, taps),
        v_taps=torch.randn(heads, key, taps),
        rates=torch.rand(heads, key) + 1e-3,
        beta=torch.randn(heads, width) / 4,
        gate=torch.randn(heads, key) @ directions,
    )


def test_features_are_those_of_the_model_with_the_stored_parameters(layer, x):
    directions = strongest_directions(layer, num=16)
    weights = random_weights(directions)
    made = to_parameters(weights, torch.zeros(64, 32), directions)
    module = KdaStudent(CONFIG, made)
    expected = module.features(x)
    found = MixerRun(x, rms_norm_eps=CONFIG.rms_norm_eps).features(weights).flatten(2)
    # fp32, 50 steps of a recurrence; the gate goes through a least-squares solve.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)


def test_stored_parameters_have_the_shapes_of_the_format(layer):
    directions = strongest_directions(layer, num=16)
    made = to_parameters(random_weights(directions), torch.zeros(64, 32), directions)
    shapes = {name: tuple(value.shape) for name, value in made.items()}
    assert shapes["kda.q_conv.weight"] == (64, 1, 4)
    assert shapes["kda.A_log"] == (1, 1, 4, 1)
    assert shapes["kda.dt_bias"] == (64,)
    assert shapes["kda.g_b.weight"] == (64, 16)
    assert shapes["kda.o.weight"] == (32, 64)


@pytest.mark.parametrize("rate", [0.0, 1e-9, 1e-4, 1.0, 50.0])
def test_decays_are_finite_at_any_rate(layer, rate):
    directions = strongest_directions(layer, num=16)
    weights = replace(random_weights(directions), rates=torch.full((4, 16), rate))
    made = to_parameters(weights, torch.zeros(64, 32), directions)
    assert all(value.isfinite().all() for value in made.values())
    decay = made["kda.A_log"].exp().flatten()[:, None] * torch.nn.functional.softplus(
        made["kda.dt_bias"].unflatten(0, (4, 16))
    )
    torch.testing.assert_close(decay, torch.full_like(decay, min(max(rate, 7e-7), 4.5)))


def test_what_is_kept_changes_no_result(layer, x):
    run = MixerRun(x, rms_norm_eps=1e-5)
    weights = starting_point(layer, conv_size=4)
    run.keep(weights)
    for move in MOVES:
        for label, option in move.options(layer, weights):
            fresh = MixerRun(x, rms_norm_eps=1e-5).features(option)
            assert torch.equal(run.features(option), fresh), (move.name, label)


def test_every_option_is_finite_and_keeps_shapes(layer, x):
    weights = starting_point(layer, conv_size=4)
    run = MixerRun(x, rms_norm_eps=1e-5)
    for move in MOVES:
        labels = []
        for label, option in move.options(layer, weights):
            labels.append(label)
            assert run.features(option).isfinite().all()
            for field in fields(option):
                assert getattr(option, field.name).shape == getattr(weights, field.name).shape
        assert len(set(labels)) == len(labels) > 0


def test_heads_are_taken_from_another_mixer_and_no_others(layer):
    directions = strongest_directions(layer, num=16)
    one, two = random_weights(directions), random_weights(directions)
    mixed = one.with_heads(two, [1, 3])
    for field in fields(one):
        theirs, mine = getattr(two, field.name), getattr(one, field.name)
        found = getattr(mixed, field.name)
        assert torch.equal(found[[1, 3]], theirs[[1, 3]])
        assert torch.equal(found[[0, 2]], mine[[0, 2]])


def test_tensors_that_are_the_same_are_shared(layer):
    one = starting_point(layer, conv_size=4)
    mixed = one.with_heads(replace(one, beta=one.beta + 1), [0])
    assert mixed.q is one.q
    assert mixed.beta is not one.beta
