"""Charts as SVG inside the page: its style sheet colours them, for light and dark alike."""

from __future__ import annotations

from html import escape

from kimi_convert.validation.page.charts import Chart, Point
from kimi_convert.validation.page.scale import Scale, scale_of, tick_text

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 16, 46
_LEGEND_STEP = 18
_BAR = 7.0


def svg_of(chart: Chart) -> str:
    """Return one chart as an svg element."""
    frame = _Frame(chart)
    box = f"0 0 {_WIDTH} {frame.height}"
    parts = [
        f'<svg viewBox="{box}" role="img" aria-label="{escape(chart.title)}">',
        *frame.axes(),
        *frame.limits(),
        *(part for number in range(len(chart.series)) for part in frame.series(number)),
        *frame.legend(),
        "</svg>",
    ]
    return "".join(parts)


class _Frame:
    """The place that a chart is drawn in."""

    def __init__(self, chart: Chart) -> None:
        self._chart = chart
        points = [point for series in chart.series for point in series.points]
        self._x = scale_of((p.x for p in points), log=chart.log_x, whole=chart.whole_x)
        self._y = scale_of(
            [v for p in points for v in _values(p)] + [limit.y for limit in chart.limits],
            log=chart.log_y,
        )
        self.height = _HEIGHT + _LEGEND_STEP

    def axes(self) -> list[str]:
        """Return grid lines, ticks and labels."""
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts: list[str] = []
        for value in self._y.ticks:
            y = self._down(value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">')
            parts.append(f"{tick_text(value)}</text>")
        for value in self._x.ticks:
            x = self._across(value)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">')
            parts.append(f"{tick_text(value)}</text>")
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        middle = (_LEFT + right) / 2
        parts.append(f'<text class="label" x="{middle}" y="{bottom + 36}" text-anchor="middle">')
        parts.append(f"{escape(self._chart.x_label)}</text>")
        across = (_TOP + bottom) / 2
        parts.append(
            f'<text class="label" x="12" y="{across}" text-anchor="middle" '
            f'transform="rotate(-90 12 {across})">{escape(self._chart.y_label)}</text>'
        )
        return parts

    def limits(self) -> list[str]:
        """Return the horizontal lines with their names."""
        parts: list[str] = []
        for limit in self._chart.limits:
            y = self._down(limit.y)
            parts.append(
                f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">'
                f"{escape(limit.name)}</text>"
            )
        return parts

    def series(self, number: int) -> list[str]:
        """Return the line of a series, or its bars side by side with those of the others."""
        points, colour = self._chart.series[number].points, self._chart.series[number].colour
        if all(point.low is None for point in points):
            path = " ".join(f"{self._across(p.x):.1f},{self._down(p.y):.1f}" for p in points)
            dots = [
                f'<circle class="dot c{colour}" cx="{self._across(p.x):.1f}" '
                f'cy="{self._down(p.y):.1f}" r="3"/>'
                for p in points
            ]
            return [f'<polyline class="line c{colour}" points="{path}"/>', *dots]
        shift = (number - (len(self._chart.series) - 1) / 2) * (_BAR + 3)
        return [self._bar(point, colour, shift) for point in points]

    def legend(self) -> list[str]:
        """Return the names of the series in a row below, where there is more than one."""
        if len(self._chart.series) < 2:
            return []
        parts: list[str] = []
        width = (_WIDTH - _LEFT) / len(self._chart.series)
        for number, series in enumerate(self._chart.series):
            x, y = _LEFT + number * width, _HEIGHT + _LEGEND_STEP - 8
            parts.append(
                f'<rect class="dot c{series.colour}" x="{x:.1f}" y="{y - 9}" width="10" height="10"/>'
            )
            parts.append(
                f'<text class="tick" x="{x + 15:.1f}" y="{y}">{escape(series.name)}</text>'
            )
        return parts

    def _bar(self, point: Point, colour: int, shift: float) -> str:
        low, high = (point.y if v is None else v for v in (point.low, point.high))
        x = self._across(point.x) + shift
        top, bottom = self._down(high), self._down(low)
        middle = self._down(point.y)
        return (
            f'<rect class="bar c{colour}" x="{x - _BAR / 2:.1f}" y="{top:.1f}" width="{_BAR}" '
            f'height="{max(bottom - top, 1):.1f}" rx="2"/>'
            f'<line class="mark c{colour}" x1="{x - _BAR:.1f}" x2="{x + _BAR:.1f}" '
            f'y1="{middle:.1f}" y2="{middle:.1f}"/>'
        )

    def _across(self, value: float) -> float:
        return _LEFT + _inside(self._x, value) * (_WIDTH - _LEFT - _RIGHT)

    def _down(self, value: float) -> float:
        room = _HEIGHT - _TOP - _BOTTOM
        return _TOP + (1 - _inside(self._y, value)) * room


def _inside(scale: Scale, value: float) -> float:
    return min(1.0, max(0.0, scale.place(value)))


def _values(point: Point) -> list[float]:
    return [v for v in (point.y, point.low, point.high) if v is not None]
