"""A report as aligned plain lines for a pipe, or as rich tables for a terminal. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from kimi_convert.commands._report import Facts, Heading, Report, Section, Sentence, Table

_GAP = "  "


def plain_lines(report: Report) -> Iterator[str]:
    """Return lines without styles, never cut or wrapped, so that `grep` and `awk` work."""
    before: Section | None = None
    for section in report:
        if before is not None and not (
            isinstance(before, Sentence) and isinstance(section, Sentence)
        ):
            yield ""
        before = section
        match section:
            case Heading():
                yield from ("", section.text)
            case Sentence():
                yield section.text
            case Facts():
                yield section.title
                width = max((len(label) for label, _ in section.pairs), default=0)
                yield from (
                    f"{_GAP}{label:<{width}}{_GAP}{value}" for label, value in section.pairs
                )
            case Table():
                yield section.title
                yield from _plain_rows(section)


def rich_group(report: Report) -> RenderableType:
    """Return the same for a terminal; text is never read as markup."""
    return Group(*(_rich_section(section) for section in report))


def _plain_rows(table: Table) -> Iterator[str]:
    rows = (table.columns, *table.rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [name in table.right for name in table.columns]
    for row in rows:
        cells = [
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, right, strict=True)
        ]
        yield (_GAP + _GAP.join(cells)).rstrip()


def _rich_section(section: Section) -> RenderableType:
    match section:
        case Heading():
            return Padding(Text(section.text, style="bold cyan"), (1, 0, 1, 1))
        case Sentence():
            return Padding(
                Text(section.text, style="yellow" if section.warns else ""), (0, 0, 1, 1)
            )
        case Facts():
            grid = RichTable.grid(padding=(0, 2))
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(overflow="fold")
            for pair in section.pairs:
                grid.add_row(*map(Text, pair))
            return Padding(Group(_title(section.title), Padding(grid, (0, 0, 0, 2))), (0, 0, 1, 1))
        case Table():
            return Padding(Group(_title(section.title), _rich_table(section)), (0, 0, 1, 1))


def _rich_table(table: Table) -> RichTable:
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in table.columns:
        drawn.add_column(
            Text(name), justify="right" if name in table.right else "left", overflow="fold"
        )
    for row in table.rows:
        drawn.add_row(*_texts(row))
    return drawn


def _texts(cells: Sequence[str]) -> list[Text]:
    return [Text(cell) for cell in cells]


def _title(text: str) -> Text:
    return Text(text, style="bold")
