from __future__ import annotations

import pytest

from kimi_convert.validation.page.scale import scale_of, tick_text


def test_logarithmic_axis_goes_from_power_to_power():
    scale = scale_of([3e-7, 2e-2], log=True)
    assert (scale.low, scale.high) == pytest.approx((1e-7, 1e-1))
    assert scale.place(1e-4) == pytest.approx(0.5)
    assert len(scale.ticks) == 7


def test_equal_values_still_have_an_axis():
    assert scale_of([1.0], log=True).place(1.0) == 0
    assert scale_of([2.0, 2.0], log=False).place(2.0) == pytest.approx(0.5)


def test_ticks_are_round_numbers_inside():
    scale = scale_of([2.03, 4.41], log=False)
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)
    assert scale.ticks[:2] == pytest.approx((2.0, 2.5))
    assert scale_of(range(61), log=False, whole=True).ticks[:2] == (0, 10)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-5, "1e-05"), (0.25, "0.25"), (0, "0"), (4000, "4k"), (1.6e7, "16M"), (2e9, "2G")],
)
def test_labels_are_short(value, text):
    assert tick_text(value) == text
