"""The search and the gate on planted problems: what was put in is found."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from kimi_convert.conversion.calibration.gate import solve_gate, strongest_directions
from kimi_convert.conversion.calibration.mixer import MixerRun
from kimi_convert.conversion.calibration.moves import MOVES, Move, starting_point
from kimi_convert.conversion.calibration.scoring import Scores
from kimi_convert.conversion.calibration.search import search_mixer
from tests.unit.conversion.calibration.teachers import TYPES, inputs, statistics

EPS = 1e-5
BY_NAME = {move.name: move for move in MOVES}


@pytest.fixture
def x():
    return inputs(rows=8, length=48)


@pytest.fixture
def layer(tmp_path, x):
    return statistics(tmp_path, TYPES["full-q"], x)


def option(layer, weights, move, label):
    return dict(BY_NAME[move].options(layer, weights))[label]


def outputs(x, weights):
    """What a mixer gives through random output weights [H V, D]."""
    generator = torch.Generator().manual_seed(5)
    z = MixerRun(x, rms_norm_eps=EPS).features(weights).flatten(2)
    return z @ torch.randn(z.shape[-1], 32, generator=generator)


def floor(x, weights):
    """What the penalty of the ridge leaves of the mixer that made the outputs."""
    z = MixerRun(x, rms_norm_eps=EPS).features(weights).flatten(2)
    return Scores(z, outputs(x, weights), num_heads=4).error


def found_in(layer, x, y, moves=MOVES):
    return search_mixer(layer, x, y, conv_size=4, rms_norm_eps=EPS, moves=moves)


def test_mixer_that_the_search_starts_from_is_recognised(layer, x):
    start = starting_point(layer, conv_size=4)
    found = found_in(layer, x, outputs(x, start))
    assert found.start_error == pytest.approx(floor(x, start))
    assert found.error <= found.start_error < 0.02


@pytest.mark.parametrize(
    ("move", "label"),
    [("decay", "0.3 to 3"), ("decay", "30 to 30"), ("beta", "0.9"), ("basis", "mirrored")],
)
def test_option_that_made_the_outputs_is_chosen_by_every_head(layer, x, move, label):
    start = starting_point(layer, conv_size=4)
    truth = option(layer, start, move, label)
    found = found_in(layer, x, outputs(x, truth), moves=(BY_NAME[move],))
    assert [choices.get(move) for choices in found.choices] == [label] * 4
    # No gate was planted either, so the true mixer's error is all that is left.
    assert found.error == pytest.approx(floor(x, truth), rel=1e-3)
    assert found.start_error > 3 * found.error


def test_heads_choose_apart(layer, x):
    start = starting_point(layer, conv_size=4)
    fast = option(layer, start, "decay", "0.2 to 1")
    y = outputs(x, start.with_heads(fast, [1, 2]))
    found = found_in(layer, x, y, moves=(BY_NAME["decay"],))
    assert [choices.get("decay") for choices in found.choices] == [
        None,
        "0.2 to 1",
        "0.2 to 1",
        None,
    ]


def test_planted_kda_layer_is_recovered_through_all_moves(layer, x):
    weights = starting_point(layer, conv_size=4)
    for move, label in (("basis", "centred"), ("beta", "0.4"), ("decay", "1 to 10")):
        weights = option(layer, weights, move, label)
    found = found_in(layer, x, outputs(x, weights))
    assert found.start_error > 0.1
    assert found.error < 0.02


def test_search_never_ends_worse_than_it_starts(layer, x):
    y = torch.randn(8, 48, 32)
    found = found_in(layer, x, y)
    assert found.error <= found.start_error


def test_two_searches_give_the_same(layer, x):
    y = torch.randn(8, 48, 32).cumsum(1)
    one, two = found_in(layer, x, y), found_in(layer, x, y)
    assert one.choices == two.choices
    assert one.error == two.error
    for field in fields(one.weights):
        assert torch.equal(getattr(one.weights, field.name), getattr(two.weights, field.name))


def test_passes_are_the_options_and_do_not_grow_with_heads(layer, x):
    seen = []

    def three(_, weights):
        for factor in (0.5, 2.0, 3.0):
            seen.append(factor)
            yield str(factor), replace(weights, rates=factor * weights.rates)

    found = found_in(layer, x, torch.randn(8, 48, 32), moves=(Move("rates", three),))
    assert len(seen) == 3
    assert found.passes == 4


def gate_problem(layer, x, strength):
    start = starting_point(layer, conv_size=4)
    directions = strongest_directions(layer, num=16)
    gate = strength * torch.randn(4, 16, generator=torch.Generator().manual_seed(3)) @ directions
    y = outputs(x, replace(start, gate=gate))
    run = MixerRun(x, rms_norm_eps=EPS)
    return start, run, Scores(run.features(start).flatten(2), y, num_heads=4)


def test_planted_gate_is_found(layer, x):
    start, run, scores = gate_problem(layer, x, strength=0.2)
    before = scores.error
    found = solve_gate(layer, run, start, scores)
    after = scores.error_of(run.features(found.weights).flatten(2))
    assert before > 0.02
    assert after < before / 5


def test_no_gate_is_put_where_none_helps(layer, x):
    start, run, scores = gate_problem(layer, x, strength=0.0)
    assert solve_gate(layer, run, start, scores).weights is start


def test_gate_lies_in_the_span_of_its_directions(layer, x):
    start, run, scores = gate_problem(layer, x, strength=0.3)
    found = solve_gate(layer, run, start, scores)
    solved = torch.linalg.lstsq(found.directions.T, found.weights.gate.T)
    back = (found.directions.T @ solved.solution).T
    torch.testing.assert_close(back, found.weights.gate, rtol=1e-3, atol=1e-4)


def test_directions_have_unit_power_and_do_not_correlate(layer):
    directions = strongest_directions(layer, num=16)
    torch.testing.assert_close(
        directions @ layer.covariance @ directions.T, torch.eye(16), rtol=1e-3, atol=1e-3
    )


def test_model_narrower_than_a_head_has_directions_of_nothing(layer):
    directions = strongest_directions(layer, num=40)
    assert directions.shape == (40, 32)
    assert not directions[32:].any()
