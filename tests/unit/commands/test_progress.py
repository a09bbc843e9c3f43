"""Progress as sparse lines and as a bar."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from kimi_convert.commands._progress import ProgressBar, ProgressLines
from kimi_convert.config.progress import ProgressEvent


def lines_of(events):
    """Feed (second, event) pairs and return the lines."""
    now = 0.0
    written = []
    lines = ProgressLines(written.append, clock=lambda: now)
    for now, event in events:  # noqa: B007
        lines(event)
    return written


def writing(done, total=1000, unit="tensors"):
    return ProgressEvent("writing", done, total, unit)


def test_many_finished_bars_leave_the_screen():
    console = Console(file=StringIO(), width=200, force_terminal=True)
    with ProgressBar(console) as bar:
        for number in range(20):
            bar(ProgressEvent(f"file {number}", 10, 10, "bytes"))
        shown = [task.description for task in bar.tasks if task.visible]
    assert shown == [f"file {number}" for number in range(12)]


def test_lines_of_stages_that_alternate_come_as_each_is_due():
    events = []
    for second in range(0, 41, 2):
        events += [(second, ProgressEvent(name, second, 40, "bytes")) for name in ("a", "b")]
    written = lines_of(events)
    assert [line[0] for line in written] == ["a", "b"] * 4


def test_fast_stage_gives_one_line_at_its_end():
    events = [(step / 1000, writing(step)) for step in range(1001)]
    assert lines_of(events) == ["writing: 100% (1000 of 1000 tensors)"]


def test_slow_stage_gives_a_line_every_ten_seconds():
    written = lines_of([(step, writing(10 * step)) for step in range(1, 101)])
    assert [line.split()[1] for line in written] == [
        *(f"{percent}%" for percent in range(11, 100, 10)),
        "100%",
    ]


def test_very_slow_stage_gives_no_two_lines_with_one_percent():
    written = lines_of([(20 * step, writing(step, total=100_000)) for step in range(1, 3000)])
    assert [line.split()[1] for line in written] == ["1%", "2%"]


def test_end_is_told_once():
    assert len(lines_of([(0, writing(1000)), (1, writing(1000)), (60, writing(1000))])) == 1


def test_each_stage_is_told():
    other = ProgressEvent("hashing", 2_000_000, 2_000_000, "bytes")
    assert lines_of([(0, writing(1000)), (0, other)])[-1] == "hashing: 100% (2.0 MB of 2.0 MB)"


def test_share_is_told_with_what_is_worked_on_in_place_of_amounts():
    events = [
        (11, ProgressEvent("fitting", 250, 800, "%", "layer 2")),
        (12, ProgressEvent("fitting", 800, 800, "%")),
    ]
    assert lines_of([(0, ProgressEvent("fitting", 0, 800, "%", "layer 0")), *events]) == [
        "fitting: 31% (layer 2)",
        "fitting: 100% (done)",
    ]


def test_stage_of_nothing_is_complete():
    assert lines_of([(0, writing(0, total=0))]) == ["writing: 100% (0 of 0 tensors)"]


def test_bar_shows_stage_and_amount_of_every_stage():
    console = Console(file=StringIO(), force_terminal=True, width=120, color_system=None)
    with ProgressBar(console) as bar:
        bar(writing(500))
        bar(writing(1000))
        bar(ProgressEvent("hashing [1]", 0, 0, "bytes"))
    shown = console.file.getvalue()
    assert "writing" in shown
    assert "1000 of 1000 tensors" in shown
    assert "hashing [1]" in shown
