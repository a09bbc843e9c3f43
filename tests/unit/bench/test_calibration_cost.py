"""What a layer takes is read off the progress rightly."""

from __future__ import annotations

import pytest

from kimi_convert.bench.calibration_cost import LayerSeconds, Trace, layer_seconds
from kimi_convert.config.progress import ProgressEvent

LAYERS, SETS = 4, 5
PLANTED = LayerSeconds(search=10.0, tried_first=1.0, tried_more=0.5, chosen=0.25, solved=4.0)


def planted():
    """The progress of a calibration whose every layer takes what is planted, the first one less."""
    trace, now = Trace(), 0.0

    def tell(stage, done, after=0.0):
        nonlocal now
        now += after
        trace.events.append((now, ProgressEvent(stage, done, 0, "%")))

    for n in range(LAYERS):
        tried = PLANTED.tried_first + PLANTED.tried_more * (n - 1)
        tell("fitting mixers", 100 * n, after=tried if n else 0.0)
        tell("fitting mixers", 100 * n + 40, after=4.0)
        tell("fitting mixers", 100 * n + 100, after=6.0 if n else 1.0)
    tell("fitting mixers", 100 * LAYERS, after=9.0)
    for stage, seconds in (
        ("choosing layers", PLANTED.chosen * SETS),
        ("solving outputs", PLANTED.solved),
    ):
        for n in range(LAYERS + 1):
            tell(stage, n, after=seconds if n > 1 else 0.1)
    return trace


def test_seconds_of_a_layer_are_those_that_were_planted():
    found = layer_seconds(planted(), num_layers=LAYERS, num_sets=SETS)
    for name in ("search", "tried_first", "tried_more", "chosen", "solved"):
        assert getattr(found, name) == pytest.approx(getattr(PLANTED, name)), name


def test_a_whole_model_takes_the_sum_of_its_layers():
    tried = 3 * PLANTED.tried_first + (0 + 1 + 2) * PLANTED.tried_more
    expected = 3 * (10.0 + 11 * 0.25 + 4.0) + tried
    assert PLANTED.total(3) == pytest.approx(expected)
