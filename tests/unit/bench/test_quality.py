"""The rows of the quality bench."""

from __future__ import annotations

from kimi_convert.bench import quality
from kimi_convert.config.calibration import InitMethod


def test_every_method_has_a_row_at_the_same_tokens_and_layers():
    rows = dict(quality.starts([100]))
    fitted = [method for method in InitMethod if method is not InitMethod.COPY]
    for steps, suffix in ((0, ""), (100, " + 100 steps")):
        for method in fitted:
            recipe = rows[f"{method}{suffix}"]
            assert recipe.calibration is not None
            assert recipe.calibration.method is method
            assert recipe.calibration.align.steps == steps
            assert recipe.kept_layers(8) == (3, 7)
        assert len({rows[f"{method}{suffix}"].calibration.tokens for method in fitted}) == 1


def test_rows_have_names_of_their_own():
    names = [name for name, _ in quality.starts([100, 300])]
    assert len(names) == len(set(names))
