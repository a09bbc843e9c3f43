"""Errors per head on planted features."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.conversion.calibration.head_errors import _attended, head_errors
from tests.unit.conversion.calibration.teachers import TYPES, inputs, mla_layer

HEADS, WIDTH = 4, 16


@pytest.fixture
def given(tmp_path):
    mla = mla_layer(tmp_path, TYPES["low-rank-q"])
    x = inputs(6, 40)
    with torch.no_grad():
        yield mla, x, _attended(mla, x)


def test_head_that_is_a_turned_copy_has_no_error_and_one_of_noise_has_all(given):
    mla, x, attended = given
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    z = attended.unflatten(-1, (HEADS, WIDTH)) @ turn
    z[:, :, 1] = torch.randn_like(z[:, :, 1])
    z[:, :, 2] = 0
    found = head_errors(mla, x, z.flatten(2))
    for head in (0, 3):
        # The penalty of 1e-2 leaves about its own square.
        assert found[head]["error"] < 1e-2
        assert found[head]["cosine"] > 0.99
        assert found[head]["norm_ratio"] == pytest.approx(1, abs=0.05)
    assert found[1]["error"] > 0.9
    assert found[2] == {"error": 1.0, "cosine": 0.0, "norm_ratio": 0.0}
