"""The one place that prints: results on stdout; errors, notes and progress on stderr.

For people: tables and bars on a terminal, plain lines in a pipe. With `--json` stdout carries
exactly one JSON document. With `--quiet` nothing is printed but errors and generated text.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol, TextIO, cast

import typer
from rich.console import Console
from rich.text import Text

from kimi_convert.commands._errors import LostOutputError
from kimi_convert.commands._progress import ProgressBar, ProgressLines
from kimi_convert.commands._render import plain_lines, rich_group
from kimi_convert.commands._report import Report
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.config.secrets import without_secrets
from kimi_convert.errors import KimiConvertError

_BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE, as a shell reports it
_LOGGER = "kimi_convert"


class Document(Protocol):
    """A result that can be printed as JSON."""

    def to_json(self) -> Mapping[str, object]: ...


class Output:
    """Where one command prints."""

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False
    ) -> None:
        """Choose the form, and let the library's log show on stderr."""
        self._as_json = as_json
        self._quiet = quiet
        self._results = _PipeConsole(highlight=False, soft_wrap=False)
        self._messages = _PipeConsole(stderr=True, highlight=False)
        level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
        # Read when it is imported: its warnings tell of what is told here in other words.
        os.environ.setdefault("HF_HUB_VERBOSITY", "info" if verbose else "error")
        logger = logging.getLogger(_LOGGER)
        logger.handlers = [_LogHandler(self._message)]
        logger.setLevel(level)

    def show(self, result: Document, report: Callable[[], Report]) -> None:
        """Print a result: its document with `--json`, else what `report` makes of it."""
        self.document(result)
        if not (self._as_json or self._quiet):
            self.report(report())

    def document(self, result: Document) -> None:
        """Print a result's document with `--json`, else nothing."""
        if self._as_json:
            _write(sys.stdout, _json_text(result.to_json()))

    def report(self, report: Report) -> None:
        """Print a part of the result for people; nothing with `--json` or `--quiet`."""
        if self._as_json or self._quiet:
            return
        if self._results.is_terminal:
            self._results.print(rich_group(report))
        else:
            _write(sys.stdout, "".join(f"{_printable(line)}\n" for line in plain_lines(report)))

    def stream(self, pieces: Iterator[str]) -> str:
        """Print text as it comes, unless a JSON document will hold it; return all of it."""
        text = ""
        for piece in pieces:
            text += piece
            if not self._as_json:
                _write(sys.stdout, _printable(piece))
        if not self._as_json:
            _write(sys.stdout, "\n")
        return text

    def note(self, text: str) -> None:
        """Print one line beside the result, on stderr."""
        if not self._quiet:
            self._message(text)

    @contextmanager
    def progress(self) -> Generator[ProgressCallback]:
        """Show the progress of what runs inside."""
        if self._quiet:
            yield ignore_progress
        elif self._messages.is_terminal:
            with ProgressBar(self._messages) as bar:
                yield bar
        else:
            yield ProgressLines(self._message)

    def _message(self, text: str) -> None:
        _say(self._messages, Text(_shown(text)))


def show_error(
    error: KimiConvertError, *, as_json: bool, trace: BaseException | None = None
) -> None:
    """Print an error: a few lines on stderr, or the document on stdout.

    Args:
        error: what to say.
        as_json: whether the document is wanted.
        trace: the exception whose traceback is printed before it.
    """
    if trace is not None:
        _write(sys.stderr, without_secrets("".join(traceback.format_exception(trace))))
    if as_json:
        _write(sys.stdout, without_secrets(_json_text(error.to_json())))
        return
    console = _PipeConsole(stderr=True, highlight=False)
    _say(console, Text.assemble(("error: ", "bold red"), _shown(error.message)))
    details = (
        ("where", error.where),
        ("expected", error.expected),
        ("found", error.found),
        ("hint", error.hint),
    )
    for label, text in details:
        if text:
            _say(console, Text.assemble((f"  {label + ':':<10}", "dim"), _shown(text)))


def close_streams() -> None:
    """Flush, so that a reader who has left is noticed here and not at interpreter exit."""
    _write(sys.stdout, "")
    _write(sys.stderr, "")


class _PipeConsole(Console):
    """A console whose reader may leave early."""

    def on_broken_pipe(self) -> NoReturn:
        """End quietly."""
        _leave()


class _LogHandler(logging.Handler):
    """The library's log as lines on stderr, through the console that may show a bar."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(f"{record.levelname.lower()}: {record.getMessage()}")


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        _leave()
    except OSError as error:
        _to_nowhere(stream)
        if stream is sys.stdout:
            raise LostOutputError(
                "standard output cannot be written",
                found=error.strerror or "",
                hint="Free space where it goes, or send it elsewhere.",
            ) from error


def _say(console: Console, text: Text) -> None:
    """Print on stderr; where that takes nothing, the exit code must do."""
    try:
        console.print(text, soft_wrap=True)
    except OSError:
        _to_nowhere(sys.stderr)


def _leave() -> NoReturn:
    """Stop because nobody reads."""
    _to_nowhere(sys.stdout)
    _to_nowhere(sys.stderr)
    raise typer.Exit(_BROKEN_PIPE_EXIT_CODE)


def _to_nowhere(stream: TextIO) -> None:
    """Let go of what is still buffered and of what is yet to come."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _json_text(document: Mapping[str, object]) -> str:
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """Return the value with NaN and infinities, which JSON does not have, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, object]", value)
        return {key: _finite(entry) for key, entry in entries.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in cast("Sequence[object]", value)]
    return value


def _shown(text: str) -> str:
    """Return a part of an error as it is printed: it may quote anything."""
    return _printable(without_secrets(text))


def _printable(text: str) -> str:
    """Return the text with control characters, which could steer a terminal, escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text
    )
