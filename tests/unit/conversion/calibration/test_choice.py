"""Sets of layers that could stay."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.conversion.calibration.choice import candidate_sets, chosen, longest_run
from kimi_convert.conversion.calibration.study import Study

RELEASED = (3, 7)


def study(as_kda, as_mla):
    return Study(
        kl_as_kda=dict(enumerate(as_kda)),
        kl_as_mla=dict(enumerate(as_mla)),
        log_probs=torch.empty(0),
        tokens=torch.empty(0),
    )


def test_released_pattern_comes_first_and_the_best_by_single_costs_second():
    sets = candidate_sets(
        study([0.5, 0, 0, 0, 0.1, 0, 0.3, 0], [0.1, 0, 0, 0, 0.6, 0, 0.0, 0]), RELEASED
    )
    assert sets[:2] == [RELEASED, (0, 6)]


def test_every_set_is_as_large_and_a_layer_away_from_the_best():
    sets = candidate_sets(study([0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0], [0.0] * 8), RELEASED)
    best = set(sets[1])
    assert len(set(sets)) == len(sets)
    assert all(len(kept) == 2 and kept == tuple(sorted(kept)) for kept in sets)
    assert all(len(best - set(kept)) == 1 for kept in sets[2:])


def test_pattern_that_is_the_best_already_is_listed_once():
    sets = candidate_sets(study([0, 0, 0, 1, 0, 0, 0, 1], [0.0] * 8), RELEASED)
    assert sets[0] == RELEASED
    assert sets.count(RELEASED) == 1


def test_equal_costs_are_taken_in_the_order_of_layers():
    assert candidate_sets(study([0.0] * 8, [0.0] * 8), RELEASED)[1] == (0, 1)


EVERY_ROW = torch.tensor([0.1, 0.1, 0.1, 0.2])
SOME_ROWS = torch.tensor([0.9, -0.5, 0.5, -0.4])  # of the same mean


@pytest.mark.parametrize(
    ("behind", "kept"),
    [
        ({(3, 7): EVERY_ROW}, (0, 1)),
        ({(3, 7): SOME_ROWS}, (3, 7)),
        ({(0, 7): SOME_ROWS, (0, 2): SOME_ROWS, (3, 7): EVERY_ROW}, (0, 7)),
        ({(0, 7): EVERY_ROW, (0, 2): 0 * SOME_ROWS, (3, 7): EVERY_ROW}, (0, 1)),
    ],
    ids=["by-every-row", "by-some-rows", "released-in-part", "no-more-of-the-released"],
)
def test_set_that_chance_could_put_first_yields_to_the_released_pattern(behind, kept):
    nearest = torch.tensor([1.0, 2.0, 1.0, 3.0])
    rows_of = {(0, 1): nearest, **{one: nearest + more for one, more in behind.items()}}
    choice = chosen(rows_of, released=RELEASED)
    assert choice.kept == kept
    assert choice.kl_of[0, 1] == pytest.approx(1.75)
    assert choice.chance_of[0, 1] == 0


def test_chance_is_two_standard_errors_of_the_difference():
    nearest = torch.tensor([1.0, 2.0, 4.0, 3.0])
    choice = chosen({RELEASED: nearest + SOME_ROWS, (0, 1): nearest}, released=RELEASED)
    assert choice.chance_of[RELEASED] == pytest.approx(float(SOME_ROWS.std()))  # of 4 rows


@pytest.mark.parametrize(
    ("kept", "run"), [((3, 7), 3), ((0, 7), 6), ((0, 1), 6), ((6, 7), 6), ((), 8), ((4,), 4)]
)
def test_longest_run_of_kda(kept, run):
    assert longest_run(kept, 8) == run
