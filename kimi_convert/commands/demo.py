"""`kimi-convert demo`: the whole job on the example checkpoint, with what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_convert.commands._numbers import bytes_text, seconds_text
from kimi_convert.commands._options import JsonOpt, QuietOpt, VerboseOpt
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Heading, Report, Section, Sentence, Table
from kimi_convert.commands._scores import models_table, worth
from kimi_convert.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kimi_convert.commands._demo_steps import DemoResult
    from kimi_convert.exporters.safetensors import ExportResult

EXAMPLE = "kimi-convert demo --output ./kimi-convert-demo"

OutputOpt = Annotated[
    Path,
    typer.Option("--output", metavar="DIR", help="Folder to write; an earlier demo is replaced."),
]


def demo(
    folder: OutputOpt = Path("kimi-convert-demo"),
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Convert, validate, export and run the example checkpoint, and show what was measured."""
    from kimi_convert.commands._demo_steps import run_demo

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    result = run_demo(folder, output=output)
    output.show(result, lambda: _report(result))
    if not result.validation.passed:
        raise typer.Exit(VerificationError.exit_code)


def _report(result: DemoResult) -> Report:
    sections = (Heading("What was measured"), *_quality(result), _forms(result), _sizes(result))
    times = tuple((step, seconds_text(seconds)) for step, seconds in result.seconds.items())
    return (*sections, Facts("Time", times))


def _quality(result: DemoResult) -> Iterator[Section]:
    """Give the scores on held-out text, beside those of other starts."""
    quality = result.validation.quality
    if quality is not None:
        yield models_table(quality, others=result.baselines)
        sentence = worth(quality)
        if sentence is not None:
            yield sentence
        yield Sentence(
            "No gradient was taken: the hybrid is a start that is near its teacher. A full fit "
            "takes five times the text; `convert --align 560` comes nearer still."
        )


def _forms(result: DemoResult) -> Facts:
    consistency = result.validation.consistency
    forms = consistency.forms if consistency else ()
    errors = tuple((form.form, f"{form.max_relative_error:.1e}") for form in forms)
    return Facts("Error of the hybrid's logits against one chunked prefill", errors)


def _sizes(result: DemoResult) -> Table:
    rows = (
        ("teacher", result.summary.file_bytes, result.summary.folder),
        ("hybrid", result.conversion.plan.write_bytes, result.conversion.output),
        ("hybrid, exported", _weight_bytes(result.export), result.export.output),
    )
    return Table(
        "Files",
        ("what", "weights", "where"),
        tuple((what, bytes_text(nbytes), str(where)) for what, nbytes, where in rows),
        right=("weights",),
    )


def _weight_bytes(export: ExportResult) -> int:
    from kimi_convert.checkpoints.written import WrittenShard

    return sum(file.nbytes for file in export.files if isinstance(file, WrittenShard))
