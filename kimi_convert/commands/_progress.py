"""Progress events as a bar on a terminal, or as sparse lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn

from kimi_convert.commands._numbers import bytes_text
from kimi_convert.config.progress import ProgressEvent

_LINE_SECONDS = 10.0
# With more bars than these, as for the files of a large download, finished ones leave the screen.
_SHOWN_BARS = 12


@dataclass(slots=True)
class ProgressLines:
    """One line at the end of a stage, and at most one in ten seconds and per percent before.

    Stages may alternate, as those of files that are fetched at the same time do.
    """

    write: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _last: dict[str, tuple[float, int]] = field(default_factory=dict[str, tuple[float, int]])

    def __call__(self, event: ProgressEvent) -> None:
        """Take an event."""
        now, percent = self.clock(), _percent(event)
        if percent < self._last.get(event.stage, (now, 0))[1]:
            del self._last[event.stage]  # it starts anew
        last_time, last_percent = self._last.setdefault(event.stage, (now, 0))
        due = now - last_time >= _LINE_SECONDS and percent > last_percent
        if due or (percent == 100 and last_percent < 100):
            self._last[event.stage] = (now, percent)
            self.write(f"{event.stage}: {percent}% ({_amounts(event)})")


@dataclass(slots=True)
class ProgressBar:
    """One bar for each stage; the bar of a finished stage stays, unless there are many.

    A context manager.
    """

    console: Console
    _bars: dict[str, TaskID] = field(default_factory=dict[str, TaskID])
    _progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        """Lay out the bar; nothing is shown yet."""
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[amounts]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
        )

    @property
    def tasks(self) -> list[Task]:
        """Every bar, shown or not."""
        return self._progress.tasks

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing and give the terminal its cursor back."""
        self._progress.stop()

    def __call__(self, event: ProgressEvent) -> None:
        """Take an event."""
        if event.stage not in self._bars:
            self._bars[event.stage] = self._progress.add_task(event.stage, amounts="")
        self._progress.update(
            self._bars[event.stage],
            completed=event.done,
            total=max(event.total, 1),
            amounts=_amounts(event),
            visible=event.done < event.total or len(self._bars) <= _SHOWN_BARS,
        )


def _percent(event: ProgressEvent) -> int:
    return 100 if event.done >= event.total else 100 * event.done // event.total


def _amounts(event: ProgressEvent) -> str:
    if event.unit == "%":
        return event.detail or "done"
    if event.unit == "bytes":
        return f"{bytes_text(event.done)} of {bytes_text(event.total)}"
    return f"{event.done} of {event.total} {event.unit}"
