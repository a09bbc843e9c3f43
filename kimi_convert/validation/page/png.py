"""Charts as PNG, for papers and messages: the one module that knows matplotlib."""

from __future__ import annotations

from io import BytesIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kimi_convert.validation.page.charts import Chart, Series

# The colours of the page: Okabe and Ito's, that colour-blind readers tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_SIZE_INCHES = (6.4, 4.0)
_DPI = 150


def png_of(chart: Chart) -> bytes:
    """Return one chart as the bytes of a PNG file."""
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    axes.grid(visible=True, axis="y", alpha=0.3)
    for series in chart.series:
        _draw(axes, series, colour=_COLOURS[series.colour])
    for limit in chart.limits:
        axes.axhline(limit.y, color="grey", linestyle="--", label=limit.name)
    if len(chart.series) + len(chart.limits) > 1:
        axes.legend()
    written = BytesIO()
    # Without the version of the library, so that the same numbers give the same bytes.
    figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def _draw(axes, series: Series, *, colour: str) -> None:  # noqa: ANN001  (matplotlib has no type)
    x, y = [p.x for p in series.points], [p.y for p in series.points]
    if all(point.low is None for point in series.points):
        axes.plot(x, y, marker="o", markersize=3, color=colour, label=series.name)
        return
    low = [p.y - (p.y if p.low is None else p.low) for p in series.points]
    high = [(p.y if p.high is None else p.high) - p.y for p in series.points]
    axes.errorbar(
        x, y, yerr=[low, high], fmt="o", markersize=3, capsize=3, color=colour, label=series.name
    )
