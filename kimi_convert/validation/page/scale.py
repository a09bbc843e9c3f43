"""From values to places on an axis, and the ticks that stand on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_MOST_TICKS = 7
_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis, linear or logarithmic."""

    low: float
    high: float
    log: bool
    whole: bool = False  # ticks at whole numbers

    def place(self, value: float) -> float:
        """Return where a value stands, 0 at the low end and 1 at the high end."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        return (at - low) / (high - low)

    @property
    def ticks(self) -> tuple[float, ...]:
        """Values with a line and a label."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            step = max(1, math.ceil((last - first + 1) / _MOST_TICKS))
            return tuple(10.0**power for power in range(first, last + 1, step))
        rough = (self.high - self.low) / _MOST_TICKS
        unit = 10 ** math.floor(math.log10(rough))
        step = next(s * unit for s in _STEPS if s * unit >= rough)
        step = max(1.0, round(step)) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return tuple((first + number) * step for number in range(count))


def scale_of(values: Iterable[float], *, log: bool, whole: bool = False) -> Scale:
    """Return an axis that holds all values with a little room; powers of ten where logarithmic."""
    held = list(values)
    low, high = min(held), max(held)
    if log:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        return Scale(low, high if high > low else 10 * low, log=True)
    room = _MARGIN * (high - low) or 0.5
    if whole:
        room = 0.5
    return Scale(low - room, high + room, log=False, whole=whole)


def tick_text(value: float) -> str:
    """Return a value as short as a label must be: 1e-05, 0.25, 4k, 16M."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e12):
        return f"{value:.0e}"
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if size >= 10**power:
            return f"{value / 10**power:.4g}{letter}"
    return f"{value:.4g}"
