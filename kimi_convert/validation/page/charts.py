"""What is drawn, as data: the same charts become SVG in the page and PNG beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kimi_convert.validation.page.data import ReportData
from kimi_convert.validation.parity.report import ImplementationResult
from kimi_convert.validation.report import ModelScores, Scores

# Name of a group of implementations -> the dtypes in it; each has one bound.
_GROUPS = {"fp32, fp64": ("float32", "float64"), "bf16": ("bfloat16",), "fp16": ("float16",)}


@dataclass(frozen=True, slots=True)
class Point:
    """A value at x; where it has a range, from low to high."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour; a line, or bars where they have ranges."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0  # its place in the palette


@dataclass(frozen=True, slots=True)
class Limit:
    """A horizontal line."""

    y: float
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One drawing."""

    key: str  # name of the PNG file
    title: str
    note: str  # a sentence below the title
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    limits: tuple[Limit, ...] = ()
    log_x: bool = False
    log_y: bool = False
    whole_x: bool = False  # layers and the like


def charts_of(data: ReportData) -> list[Chart]:
    """Return every chart that there is data for."""
    drawn = [*_errors(data), *_positions(data), _memory(data), *_decay(data)]
    return [chart for chart in drawn if any(series.points for series in chart.series)]


def _errors(data: ReportData) -> list[Chart]:
    """Per layer, from the smallest to the largest error of the implementations of one dtype."""
    groups = {
        name: [one for one in data.parity.implementations if one.dtype in dtypes]
        for name, dtypes in _GROUPS.items()
    }
    series: list[Series] = []
    limits: dict[float, Limit] = {}
    for name, results in groups.items():
        spread = tuple(_spread(results, data.parity.num_layers))
        if spread:
            series.append(Series(name, spread, colour=len(series)))
            bound = max(one.comparison.bound for one in results)
            limits[bound] = Limit(bound, f"bound {bound:.0e}")
    return [
        Chart(
            key="errors-by-layer",
            title="Error of the hidden state after each layer",
            note="Largest difference over largest value, against the reference in fp32: the bar "
            "goes from the best to the worst implementation, the mark is their median. What is "
            "equal to the last bit is not drawn.",
            x_label="layer",
            y_label="relative error",
            series=tuple(series),
            limits=tuple(limits.values()),
            log_y=True,
            whole_x=True,
        )
    ]


def _spread(results: Sequence[ImplementationResult], num_layers: int) -> Iterable[Point]:
    for layer_idx in range(num_layers):
        errors = sorted(
            one.comparison.hidden[layer_idx]
            for one in results
            if one.comparison.hidden.get(layer_idx, 0) > 0
        )
        if errors:
            yield Point(layer_idx, errors[len(errors) // 2], errors[0], errors[-1])


def _positions(data: ReportData) -> list[Chart]:
    if data.quality is None:
        return []
    models = {
        "this checkpoint": data.quality.student,
        "teacher": data.quality.teacher,
        "converted mixers off": data.quality.ablated,
    }
    wanted: tuple[tuple[str, str, str, str, Callable[[Scores], float | None]], ...] = (
        ("loss-by-position", "Loss by position", "nats per token", "Lower is better.", _loss),
        (
            "kl-by-position",
            "KL to the teacher by position",
            "nats per token",
            "How far the predictions are from the teacher's.",
            _kl,
        ),
        (
            "agreement-by-position",
            "Agreement with the teacher by position",
            "share of tokens",
            "How often the likeliest token is the teacher's.",
            _agreement,
        ),
    )
    return [
        Chart(
            key=key,
            title=title,
            note=f"{note} Each point is the mean over the positions up to it.",
            x_label="tokens before",
            y_label=unit,
            series=tuple(
                Series(name, _by_position(scores, value), colour)
                for colour, (name, scores) in enumerate(models.items())
                if scores is not None and _by_position(scores, value)
            ),
        )
        for key, title, unit, note, value in wanted
    ]


def _loss(scores: Scores) -> float | None:
    return scores.loss


def _kl(scores: Scores) -> float | None:
    return scores.kl


def _agreement(scores: Scores) -> float | None:
    return scores.top1_agreement


def _by_position(model: ModelScores, value: Callable[[Scores], float | None]) -> tuple[Point, ...]:
    found = ((part.stop, value(part.scores)) for part in model.by_position)
    return tuple(Point(stop, score) for stop, score in found if score is not None)


def _memory(data: ReportData) -> Chart:
    return Chart(
        key="memory-by-context",
        title="State and cache by context length",
        note="Bytes for one sequence: KDA states in fp32, MLA latents in bf16.",
        x_label="tokens of context",
        y_label="bytes",
        series=(
            Series(
                "this checkpoint",
                tuple(Point(p.tokens, p.states + p.cache) for p in data.memory),
            ),
            Series("all layers MLA", tuple(Point(p.tokens, p.all_mla) for p in data.memory), 1),
        ),
        log_x=True,
        log_y=True,
    )


def _decay(data: ReportData) -> list[Chart]:
    points = tuple(
        Point(one.layer_idx, one.quantiles[2], one.quantiles[0], one.quantiles[-1])
        for one in data.parity.decay
    )
    return [
        Chart(
            key="decay-spectrum",
            title="Decay spectrum of each KDA layer",
            note="Half-life of the key channels on the tokens that were run: from the 5th to the "
            "95th percentile, the mark is the median.",
            x_label="layer",
            y_label="half-life, tokens",
            series=(Series("channels", points),),
            log_y=True,
            whole_x=True,
        )
    ]
