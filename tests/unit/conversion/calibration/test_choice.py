"""Sets of layers that could stay."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.conversion.calibration.choice import candidate_sets, longest_run
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


@pytest.mark.parametrize(
    ("kept", "run"), [((3, 7), 3), ((0, 7), 6), ((0, 1), 6), ((6, 7), 6), ((), 8), ((4,), 4)]
)
def test_longest_run_of_kda(kept, run):
    assert longest_run(kept, 8) == run
