"""The bench of features of queries and keys."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.bench import features
from kimi_convert.conversion.calibration.bases import balanced
from kimi_convert.conversion.calibration.mixer import MixerRun
from kimi_convert.conversion.calibration.moves import starting_point, with_basis
from tests.unit.conversion.calibration.teachers import TYPES, inputs, statistics


@pytest.fixture
def x():
    return inputs(rows=4, length=48)


@pytest.fixture
def layer(tmp_path, x):
    return statistics(tmp_path, TYPES["full-q"], x)


def test_silu_of_gain_3_is_what_a_search_starts_from(layer, x):
    start = starting_point(layer, conv_size=4)
    weights = with_basis(layer, start, *balanced(layer, rope=True))
    expected = MixerRun(x, rms_norm_eps=1e-5).features(weights).flatten(2)
    found = features._features(x, weights, layer, features.FEATURES["SiLU, gain 3"])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_feature_that_made_the_outputs_is_told_from_others(layer, x):
    start = starting_point(layer, conv_size=4)
    weights = with_basis(layer, start, *balanced(layer, rope=True))
    truth = features.FEATURES["SiLU, gain 3"]
    z = features._features(x, weights, layer, truth)
    y = z @ torch.randn(z.shape[-1], 32)
    errors = {
        name: features.measure(layer, x, y, features.FEATURES[name]).error
        for name in ("linear", "SiLU, gain 0.3", "SiLU, gain 3", "positive part")
    }
    assert min(errors, key=errors.get) == "SiLU, gain 3"
    assert errors["SiLU, gain 3"] < 0.02 < errors["linear"]


def test_weights_of_positive_features_cancel_less_than_those_with_signs_turned(layer, x):
    y = torch.randn(4, 48, 32).cumsum(1)
    positive, turned, linear = (
        features.measure(layer, x, y, features.FEATURES[name]).uncancelled
        for name in (
            "positive part",
            "positive part, signs of half of q's channels turned",
            "linear",
        )
    )
    assert positive > max(turned, linear)
