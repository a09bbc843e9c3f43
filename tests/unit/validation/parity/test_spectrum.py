from __future__ import annotations

import math

import pytest
import torch

from kimi_convert.validation.parity.spectrum import decay_spectra
from kimi_convert.validation.parity.stages import Probe
from kimi_convert.validation.parity.trace import Trace


def test_half_life_is_where_half_is_left():
    g = torch.full((2, 5, 3, 4), -math.log(2) / 8)  # [B, T, H, K]
    g[:, :, 0] = -math.log(2) / 2
    (found,) = decay_spectra(Trace({Probe(1, "kda.decay"): g}))
    assert found.layer_idx == 1
    assert found.quantiles == pytest.approx((2, 2, 8, 8, 8))


def test_channel_that_forgets_nothing_is_finite():
    (found,) = decay_spectra(Trace({Probe(0, "kda.decay"): torch.zeros(1, 2, 1, 3)}))
    assert found.quantiles[0] == pytest.approx(1e9)
