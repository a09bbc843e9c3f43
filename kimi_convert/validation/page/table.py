"""A table of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Yield a table whose first column is a heading; all cells are escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    yield f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>'
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        yield f"<tr><th>{escape(first)}</th>{cells}</tr>"
    yield "</tbody></table></div>"
