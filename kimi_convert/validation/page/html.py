"""One page that needs nothing else: no script, no font, no address; light and dark, wide and narrow.

Everything that comes from a folder or a process is escaped, and the page's own policy allows it
nothing but its style sheet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files

from kimi_convert.validation.page.charts import charts_of
from kimi_convert.validation.page.data import ReportData
from kimi_convert.validation.page.quality import quality_sections
from kimi_convert.validation.page.svg import svg_of
from kimi_convert.validation.page.table import table_of
from kimi_convert.validation.parity.report import ImplementationResult, PairError

_STYLE = "style.css"


def page_of(data: ReportData) -> str:
    """Return the page."""
    parts = (
        *_head(data),
        *_verdict(data),
        *_layer_map(data),
        *_charts(data),
        *_implementations(data),
        *_faults(data),
        *_matrix(data),
        *quality_sections(data),
        *_provenance(data),
        "</main></body></html>\n",
    )
    return "\n".join(parts)


def _head(data: ReportData) -> Iterable[str]:
    style = files("kimi_convert.validation.page").joinpath(_STYLE).read_text(encoding="utf-8")
    title = escape(f"{data.name}: parity report")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    yield '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield f"<title>{title}</title><style>{style}</style></head><body><main>"


def _verdict(data: ReportData) -> Iterable[str]:
    parity = data.parity
    kda = len(parity.kda_layers)
    ran = len(parity.implementations) + 1
    worst = max(
        (
            one.comparison.logits.relative_error
            for one in parity.implementations
            if one.dtype == "float32"
        ),
        default=0.0,
    )
    verdict = "All implementations agree" if data.passed else "Implementations differ"
    state = "good" if data.passed else "bad"
    yield f"<header><h1>{escape(data.name)}</h1>"
    yield f'<p class="verdict {state}">{verdict}</p><dl class="facts">'
    yield from _facts(
        {
            "layers": f"{kda} KDA, {parity.num_layers - kda} MLA",
            "implementations": str(ran),
            "compared on": f"{parity.sequences} x {parity.sequence_length} {parity.tokens} tokens",
            "largest fp32 error": f"{worst:.1e}",
        }
    )
    yield "</dl></header>"


def _facts(pairs: Mapping[str, str]) -> Iterable[str]:
    for name, value in pairs.items():
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"


def _layer_map(data: ReportData) -> Iterable[str]:
    yield '<section><h2>Layer map</h2><ol class="layers">'
    for row in data.layers:
        what = f"layer {row.layer_idx}: {row.mixer.upper()}, {row.feed_forward}"
        made = f"; {row.how}" if row.how else ""
        yield (
            f'<li class="{row.mixer}" title="{escape(what + made)}">'
            f"<b>{row.layer_idx}</b><span>{row.mixer.upper()}</span><i>{row.feed_forward}</i></li>"
        )
    yield "</ol>"
    if any(row.converted for row in data.layers):
        yield "<p>KDA layers took the place of MLA layers of the source.</p>"
    yield "</section>"


def _charts(data: ReportData) -> Iterable[str]:
    yield '<section class="charts">'
    for chart in charts_of(data):
        yield f'<figure id="{chart.key}"><figcaption><h2>{escape(chart.title)}</h2>'
        yield f"<p>{escape(chart.note)}</p></figcaption>{svg_of(chart)}</figure>"
    yield "</section>"


def _implementations(data: ReportData) -> Iterable[str]:
    yield "<section><h2>Against the reference</h2>"
    yield "<p>Largest difference over largest value; KL in nats, of the worst token.</p>"
    columns = ("implementation", "dtype", "logits", "hidden", "states", "KL", "argmax", "greedy",
               "bound", "")  # fmt: skip
    yield from table_of(columns, [_cells(one) for one in data.parity.implementations])
    for absent in data.parity.absent:
        said = "Failed" if absent.failed else "Not compared"
        yield f"<p>{said}: {escape(absent.name)}. {escape(absent.why)}</p>"
    yield "</section>"


def _cells(one: ImplementationResult) -> tuple[str, ...]:
    found = one.comparison
    logits = found.logits
    greedy = "-" if one.greedy is None else f"{one.greedy.equal}/{one.greedy.tokens}"
    return (
        one.name,
        one.dtype,
        f"{logits.relative_error:.1e}",
        _worst(found.hidden),
        _worst(found.states),
        f"{max(logits.kl, 0.0):.0e}",
        f"{logits.tokens - logits.disagreements}/{logits.tokens}",
        greedy,
        f"{found.bound:.0e}",
        "agrees" if one.passed else "DIFFERS",
    )


def _worst(by_layer: Mapping[int, float]) -> str:
    return f"{max(by_layer.values()):.1e}" if by_layer else "-"


def _faults(data: ReportData) -> Iterable[str]:
    found = [one for one in data.parity.implementations if one.comparison.location is not None]
    if not found:
        return
    yield "<section><h2>Where it starts</h2><ul>"
    for one in found:
        at = one.comparison.location
        assert at is not None
        note = f" {at.note}." if at.note else ""
        yield (
            f"<li><b>{escape(one.name)}</b>: first at <code>{escape(at.name)}</code> "
            f"({escape(at.made_of)}), error {at.error:.1e}.{escape(note)}</li>"
        )
    yield "</ul></section>"


def _matrix(data: ReportData) -> Iterable[str]:
    names = (data.parity.reference, *(one.name for one in data.parity.implementations))
    pairs = {frozenset((pair.first, pair.second)): pair for pair in data.parity.pairs}
    yield "<section><h2>Logits of all pairs</h2>"
    yield "<p>Grey pairs need not agree: the two make other choices where implementations of "
    yield 'this model disagree, as their tips say.</p><div class="wide"><table class="matrix">'
    numbers = "".join(f"<th>{number}</th>" for number in range(1, len(names) + 1))
    yield f"<thead><tr><th>implementation</th>{numbers}</tr></thead><tbody>"
    for number, name in enumerate(names, start=1):
        cells = "".join(_pair(pairs.get(frozenset((name, other)))) for other in names)
        yield f"<tr><th>{number} {escape(name)}</th>{cells}</tr>"
    yield "</tbody></table></div></section>"


def _pair(pair: PairError | None) -> str:
    if pair is None:
        return "<td></td>"
    if pair.bound is None:
        why = escape(f"other {', '.join(pair.differs_in)}")
        return f'<td class="other" title="{why}">{pair.relative_error:.0e}</td>'
    state = "good" if pair.passed else "bad"
    return f'<td class="{state}">{pair.relative_error:.0e}</td>'


def _provenance(data: ReportData) -> Iterable[str]:
    environment = data.parity.environment
    made = {
        "compared by": f"kimi-convert {environment.kimi_convert}",
        "torch": environment.torch,
        "python": environment.python,
        "system": f"{environment.system}, {environment.threads} threads of torch",
        "GPU": ", ".join(environment.gpus) or "none",
    }
    if data.text is not None:
        made["text"] = f"{data.text.path}, sha256 {data.text.sha256}"
    yield "<section><h2>Provenance</h2>"
    yield '<dl class="facts">'
    yield from _facts({**data.provenance, **made})
    yield "</dl>"
    yield "</section>"
