"""Reports as plain lines and as rich tables."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from kimi_convert.commands._render import plain_lines, rich_group
from kimi_convert.commands._report import Facts, Sentence, Table

REPORT = (
    Facts("Model", (("layers", "8"), ("hidden size", "256"))),
    Table(
        "Files",
        ("file", "size"),
        (("model-00001-of-00002.safetensors", "12.7 MB"), ("[bold]b[/bold]", "2 bytes")),
        right=("size",),
    ),
    Sentence("All is well."),
)


def drawn(width):
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(rich_group(REPORT))
    return console.file.getvalue()


def test_plain_lines_are_aligned_and_have_no_trailing_space():
    assert list(plain_lines(REPORT)) == [
        "Model",
        "  layers       8",
        "  hidden size  256",
        "",
        "Files",
        "  file                                 size",
        "  model-00001-of-00002.safetensors  12.7 MB",
        "  [bold]b[/bold]                    2 bytes",
        "",
        "All is well.",
    ]


def test_plain_report_without_rows_keeps_its_title_and_header():
    assert list(plain_lines([Table("Empty", ("a", "b"), ())])) == ["Empty", "  a  b"]


def test_rich_report_shows_every_cell_and_reads_none_as_markup():
    shown = drawn(width=100)
    for text in ("Model", "hidden size", "256", "[bold]b[/bold]", "12.7 MB", "All is well."):
        assert text in shown


def test_narrow_terminal_folds_and_loses_nothing():
    shown = "".join(drawn(width=30).split())
    assert "model-00001-of" in shown
    assert "safetensors" in shown
