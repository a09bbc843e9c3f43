"""The command line: which commands there are, and the boundary where every error becomes a message.

Nothing here imports torch, so that help answers at once; each command imports what it runs.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from kimi_convert import __version__
from kimi_convert.commands import (
    align,
    convert,
    demo,
    doctor,
    download,
    export,
    export_onnx,
    generate,
    inspect,
    parity,
    plan,
    publish,
    validate,
)
from kimi_convert.commands._errors import (
    InterruptError,
    LostOutputError,
    UnexpectedError,
    as_error,
)
from kimi_convert.commands._output import close_streams, show_error

PROGRAM = "kimi-convert"
_INTERRUPTED = InterruptError("interrupted")

app = typer.Typer(
    name=PROGRAM,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


_export = typer.Typer(help=export.HELP)
app.add_typer(_export, name="export")


def _command(function: Callable[..., None], example: str, *, on: typer.Typer = app) -> None:
    on.command(epilog=f"Example:  {example}")(function)


_command(download.download, download.EXAMPLE)
_command(inspect.inspect, inspect.EXAMPLE)
_command(plan.plan, plan.EXAMPLE)
_command(convert.convert, convert.EXAMPLE)
_command(align.align, align.EXAMPLE)
_command(validate.validate, validate.EXAMPLE)
_command(parity.parity, parity.EXAMPLE)
_command(export.safetensors, export.SAFETENSORS_EXAMPLE, on=_export)
_command(export_onnx.onnx, export_onnx.EXAMPLE, on=_export)
_command(generate.generate, generate.EXAMPLE)
_command(publish.publish, publish.EXAMPLE)
_command(demo.demo, demo.EXAMPLE)
_command(doctor.doctor, doctor.EXAMPLE)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Turn full-attention MLA checkpoints into Kimi-Linear hybrids of KDA and MLA layers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see `kimi_convert.errors` for the codes.

    Args:
        arguments: without the program's name; those of the process if None.
    """
    _spare_the_collector()
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks must not end a run of hours.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(given)
        close_streams()
    except typer.Exit as left:
        return left.exit_code
    except LostOutputError as error:
        show_error(error, as_json=False)
        return error.exit_code
    return code


def _spare_the_collector() -> None:
    """Keep the cyclic collector from walking over the modules of torch again and again.

    It does at 700 new objects, and at the end: 0.4 of the 1.5 s of processor that importing torch
    and leaving takes. At 10,000 cycles are still found early.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


def _open_closed_streams() -> None:
    """Print to nowhere where the caller has closed a stream, as `>&-` does in a shell."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (until the end)
            setattr(sys, name, nowhere)


def _run(given: list[str]) -> int:
    as_json = "--json" in given
    try:
        code = app(given, prog_name=PROGRAM, standalone_mode=False)
    except LostOutputError:
        raise
    except Exception as caught:
        error = as_error(caught, program=PROGRAM)
        traced = isinstance(error, UnexpectedError) and not {"-v", "--verbose"}.isdisjoint(given)
        show_error(error, as_json=as_json, trace=caught if traced else None)
        return error.exit_code
    if code == _INTERRUPTED.exit_code:
        show_error(_INTERRUPTED, as_json=as_json)
    return code or 0
