"""`kimi-convert parity`: whether every implementation computes the same from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_convert.commands._options import CheckpointArg, JsonOpt, QuietOpt, VerboseOpt
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Report, Section, Sentence, Table
from kimi_convert.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from kimi_convert.validation.parity.report import ImplementationResult, PairError, ParityReport

EXAMPLE = "kimi-convert parity ./hybrid ./hybrid-f32 --text heldout.jsonl"

ArtifactsArg = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="ARTIFACT",
        help="Folders written from it: other shards, another dtype, an ONNX graph.",
        show_default=False,
    ),
]
AgainstOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        metavar="NAME",
        help="Implementation to compare with, torch for the reference alone; may be repeated. "
        "By default all that can run here.",
        show_default=False,
    ),
]
TextOpt = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='Text whose first tokens are run: .txt, or .jsonl with a "text" per line; '
        "random tokens without it.",
        show_default=False,
    ),
]
TokensOpt = Annotated[int, typer.Option(help="Tokens of each of two sequences.")]
ReportOpt = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="DIR",
        help="Write report.json, report.html and plots; new or empty.",
        show_default=False,
    ),
]
TeacherOpt = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The checkpoint it was made from; a report with --text then has KL to it.",
        show_default=False,
    ),
]
NewTokensOpt = Annotated[
    int, typer.Option(help="Tokens of the greedy continuation; 0 leaves it out.")
]


def parity(
    checkpoint: CheckpointArg,
    artifacts: ArtifactsArg = None,
    against: AgainstOpt = None,
    text: TextOpt = None,
    tokens: TokensOpt = 128,
    new_tokens: NewTokensOpt = 64,
    report: ReportOpt = None,
    teacher: TeacherOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Run a checkpoint in every implementation, and compare; exit 6 if two differ by more than rounding.

    A difference is named by the first layer and sub-module that it shows in.
    """
    from kimi_convert.validation.page.make import compare_and_report
    from kimi_convert.validation.parity.run import ParityOptions, compare_implementations

    if teacher is not None and report is None:
        raise UsageError("a teacher is for a report", expected="--report DIR", found="none")
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    options = ParityOptions(against=tuple(against or ()), tokens=tokens, new_tokens=new_tokens)
    folders = (checkpoint, artifacts or ())
    with output.progress() as on_progress:
        if report is None:
            found = compare_implementations(
                *folders, text=text, options=options, on_progress=on_progress
            )
        else:
            found = compare_and_report(
                *folders,
                folder=report,
                text=text,
                teacher=teacher,
                options=options,
                on_progress=on_progress,
            )
    output.show(found, lambda: parity_report(found))
    if report is not None:
        output.note(f"report written to {report / 'report.html'}")
    if not found.passed:
        raise typer.Exit(VerificationError.exit_code)


def parity_report(report: ParityReport) -> Report:
    """Return what `parity` shows."""
    sections: list[Section] = [_against_reference(report), _matrix(report)]
    sections += [
        Sentence(f"{one.name}: {sentence}", warns=True)
        for one in report.implementations
        for sentence in _faults(one)
    ]
    for absent in report.absent:
        said = "Failed" if absent.failed else "Not compared"
        sections.append(Sentence(f"{said}: {absent.name}. {absent.why}", warns=absent.failed))
    verdict = "Passed." if report.passed else "Failed: see above."
    return (*sections, Sentence(verdict, warns=not report.passed))


def _against_reference(report: ParityReport) -> Table:
    size = f"{report.sequences} sequences of {report.sequence_length} {report.tokens} tokens"
    columns = (
        "implementation",
        "logits",
        "hidden",
        "states",
        "KL",
        "argmax",
        "greedy",
        "bound",
        "ok",
    )
    return Table(
        f"Against the reference in fp32, largest error over largest value: {size}",
        columns,
        tuple(_cells(one) for one in report.implementations),
        right=columns[1:-1],
    )


def _cells(one: ImplementationResult) -> tuple[str, ...]:
    found = one.comparison
    logits = found.logits
    greedy = "-" if one.greedy is None else f"{one.greedy.equal}/{one.greedy.tokens}"
    return (
        one.name,
        f"{logits.relative_error:.1e}",
        _worst(found.hidden.values()),
        _worst(found.states.values()),
        f"{max(logits.kl, 0):.0e}",
        f"{logits.tokens - logits.disagreements}/{logits.tokens}",
        greedy,
        f"{found.bound:.0e}",
        "yes" if one.passed else "NO",
    )


def _worst(errors: Iterable[float]) -> str:
    worst = max(errors, default=None)
    return "-" if worst is None else f"{worst:.1e}"


def _matrix(report: ParityReport) -> Table:
    names = (report.reference, *(one.name for one in report.implementations))
    found = {(pair.second, pair.first): pair for pair in report.pairs}
    columns = tuple(str(number) for number in range(1, len(names)))
    rows = tuple(
        (
            f"{number} {name}",
            *(_pair_cell(found.get((name, other))) for other in names[:-1]),
        )
        for number, name in enumerate(names, start=1)
    )
    return Table(
        f"Logits of all {len(names)} in pairs; ~ need not agree, as the two choose otherwise where "
        "implementations disagree",
        ("implementation", *columns),
        rows,
        right=columns,
    )


def _pair_cell(pair: PairError | None) -> str:
    if pair is None:
        return ""
    mark = "~" if pair.bound is None else "" if pair.passed else "!"
    # 1e-6, not 1e-06: a row may have twenty of them.
    digits, _, exponent = f"{pair.relative_error:.0e}".partition("e")
    return f"{mark}{digits}e{int(exponent)}" if exponent else f"{mark}{digits}"


def _first_of(names: tuple[str, ...]) -> str:
    others = len(names) - 1
    return f"{names[0]} and {others} more" if others else names[0]


def _faults(one: ImplementationResult) -> Iterator[str]:
    found = one.comparison
    if found.failures:
        yield f"above the bound: {_first_of(found.failures)}"
    at = found.location
    if at is not None:
        token = "" if at.first_token is None else f", from token {at.first_token} on"
        note = f"; {at.note}" if at.note else ""
        yield (
            f"the first difference is at {at.name} ({at.made_of}): "
            f"error {at.error:.1e}, bound {at.bound:.1e}{token}{note}"
        )
    greedy = one.greedy
    if greedy is not None and not greedy.passed:
        yield (
            f"the greedy continuation parts after {greedy.equal} tokens at logits "
            f"{greedy.gap:.1e} apart; a near tie is at most {greedy.margin:.1e}"
        )
    if found.left_out:
        yield (
            f"{found.left_out} tokens are left out: two experts scored alike, "
            "and rounding chose between them"
        )
