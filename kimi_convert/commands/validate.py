"""`kimi-convert validate`: whether a checkpoint is whole and consistent, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_convert.commands._numbers import bytes_text, files_text, seconds_text
from kimi_convert.commands._options import (
    BackendOpt,
    CheckName,
    DeviceOpt,
    Dtype,
    JsonOpt,
    ModelDtypeOpt,
    NamedCheckpointArg,
    QuietOpt,
    VerboseOpt,
)
from kimi_convert.commands._output import Output
from kimi_convert.commands._quality import quality_report
from kimi_convert.commands._report import Facts, Report, Section, Sentence, Table
from kimi_convert.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from kimi_convert.validation.estimate import Estimate
    from kimi_convert.validation.report import (
        ConsistencyReport,
        Finding,
        ValidationReport,
    )

EXAMPLE = "kimi-convert validate ./hybrid --teacher ./Moonlight-16B-A3B --text heldout.jsonl"

TeacherOpt = Annotated[
    Path | None,
    typer.Option(
        metavar="SOURCE",
        help="The checkpoint it was made from: folder or name.",
        show_default=False,
    ),
]
TextOpt = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='Text to measure on: .txt, or .jsonl with a "text" per line.',
        show_default=False,
    ),
]
SequenceLengthOpt = Annotated[int, typer.Option(help="Tokens in each sequence.")]
MaxTokensOpt = Annotated[int, typer.Option(help="The most tokens to measure on.")]
MaxTokensPerKindOpt = Annotated[
    int, typer.Option(help="The same for each kind of text, so that one kind does not take all.")
]
VerifySignatureOpt = Annotated[
    Path | None,
    typer.Option(
        "--verify-signature",
        metavar="FILE",
        help="Public key (PEM) that the folder must be signed with.",
        show_default=False,
    ),
]
SkipOpt = Annotated[
    list[CheckName] | None,
    typer.Option(
        "--skip",
        help="A check or a measurement to leave out; can be given again.",
        show_default=False,
    ),
]
RecordOpt = Annotated[
    bool, typer.Option("--record", help="Write what was found into the folder, for `publish`.")
]


def validate(
    checkpoint: NamedCheckpointArg,
    teacher: TeacherOpt = None,
    text: TextOpt = None,
    sequence_length: SequenceLengthOpt = 512,
    max_tokens: MaxTokensOpt = 32768,
    max_tokens_per_kind: MaxTokensPerKindOpt = 10240,
    dtype: ModelDtypeOpt = Dtype.FLOAT32,
    device: DeviceOpt = "cpu",
    backend: BackendOpt = None,
    verify_signature: VerifySignatureOpt = None,
    skip: SkipOpt = None,
    record: RecordOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Check files, values and arithmetic, and measure quality; exit 6 if a check fails.

    Measured numbers (loss, KL) never make a checkpoint fail; damage and contradictions do.
    """
    from kimi_convert.hub.sources import fetch_source
    from kimi_convert.validation import Check, ValidationOptions, validate_checkpoint
    from kimi_convert.validation.record import write_record

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    options = ValidationOptions(
        checks=frozenset(Check) - {Check(name.value) for name in skip or ()},
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        max_tokens_per_kind=max_tokens_per_kind,
        dtype=dtype.value,
        device=device,
        backend=None if backend is None else backend.value,
    )
    _check_recordable(checkpoint, record)
    with output.progress() as on_progress:
        report = validate_checkpoint(
            fetch_source(checkpoint, on_progress=on_progress),
            teacher=teacher and fetch_source(teacher, on_progress=on_progress),
            text=text,
            public_key=verify_signature,
            options=options,
            on_progress=on_progress,
            on_estimate=lambda estimate: output.note(estimate_text(estimate)),
        )
        if record:
            write_record(report, checkpoint, on_progress=on_progress)
    output.show(report, lambda: validation_report(report))
    if not report.passed:
        raise typer.Exit(VerificationError.exit_code)


def estimate_text(estimate: Estimate) -> str:
    """Return what is said before a validation starts."""
    memory = estimate.memory
    place = "" if memory.device == "cpu" else f" on {memory.device}"
    disk = f" and {bytes_text(memory.disk_bytes)} on disk" if memory.disk_bytes else ""
    return (
        f"Estimate: {bytes_text(memory.memory_bytes)} of memory{place}{disk}, of which one layer "
        f"{bytes_text(memory.layer_bytes)}; {bytes_text(estimate.read_bytes)} to read in "
        f"{estimate.passes} passes at {bytes_text(round(estimate.bytes_per_second))}/s, "
        f"{estimate.operations / 1e9:.1f} GFLOP at "
        f"{estimate.operations_per_second / 1e9:.0f} GFLOP/s: "
        f"about {seconds_text(estimate.seconds)}"
    )


def _check_recordable(checkpoint: Path, record: bool) -> None:
    from kimi_convert.hub import reference_of

    if record and reference_of(checkpoint) is not None:
        raise UsageError(
            "--record writes into the folder, and the Hub's cache is shared with others",
            hint="Download it with --local-dir first.",
        )


def validation_report(report: ValidationReport) -> Report:
    """Return what `validate` shows."""
    quality = quality_report(report.quality) if report.quality else []
    checks, verdict = brief_report(report)[:-1], brief_report(report)[-1]
    return (*checks, *quality, verdict)


def brief_report(report: ValidationReport) -> Report:
    """Return the checks and the verdict, without what was measured."""
    sections: list[Section] = [_integrity(report)]
    if report.consistency:
        sections.append(_consistency(report.consistency))
    sections += [_finding(finding) for finding in report.findings]
    sections += _not_checked(report)
    verdict = "Passed." if report.passed else "Failed: see the errors above."
    return (*sections, Sentence(verdict, warns=not report.passed))


def _integrity(report: ValidationReport) -> Facts:
    found = report.integrity
    hashes = "none recorded"
    if found.hashes_from:
        recorded = ", ".join(found.hashes_from)
        hashes = f"{files_text(found.files_hashed)}, {found.tensors_hashed} tensors as {recorded} records"
    signed = (
        ()
        if report.signed_files is None
        else (("signature", f"holds for {files_text(report.signed_files)}"),)
    )
    return Facts(
        f"Integrity of {report.checkpoint}",
        (
            ("tensors", f"{found.tensors}, {bytes_text(found.nbytes)}"),
            ("searched for NaN and Inf", str(found.values_scanned)),
            ("hashes", hashes),
            ("left out", str(len(found.left_out))),
            *signed,
        ),
    )


def _consistency(found: ConsistencyReport) -> Table:
    size = f"{found.sequences} sequences of {found.sequence_length} tokens ({found.tokens})"
    rows = tuple(
        (form.form, f"{form.max_relative_error:.1e}", "yes" if form.passed else "NO")
        for form in found.forms
    )
    return Table(
        f"The same logits in every form: {size}, bound {found.bound:.1e}",
        ("form", "error", "within the bound"),
        rows,
        right=("error",),
    )


def _not_checked(report: ValidationReport) -> list[Sentence]:
    """Say what was left out, once for each reason."""
    checks: dict[str, list[str]] = {}
    for left in report.not_run:
        checks.setdefault(left.why, []).append(left.check)
    return [Sentence(f"Not checked: {', '.join(names)}. {why}") for why, names in checks.items()]


def _finding(finding: Finding) -> Sentence:
    details = (("expected", finding.expected), ("found", finding.found))
    said = "".join(f"; {label} {text}" for label, text in details if text)
    return Sentence(
        f"{finding.severity}: {finding.check}: {finding.where}: {finding.message}{said}",
        warns=True,
    )
