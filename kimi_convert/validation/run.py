"""Validate a checkpoint: integrity, consistency of its forms, quality on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_convert.checkpoints.signing import check_signature
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.errors import VerificationError
from kimi_convert.kernels.backend import resolve_backend
from kimi_convert.model.backend import usable_device
from kimi_convert.validation.consistency import measure_consistency
from kimi_convert.validation.environment import this_environment
from kimi_convert.validation.estimate import Estimate, estimate_validation
from kimi_convert.validation.greedy import measure_greedy
from kimi_convert.validation.integrity import TENSORS, check_integrity
from kimi_convert.validation.memory_need import memory_need, require_room, too_large
from kimi_convert.validation.options import Check, ValidationOptions
from kimi_convert.validation.quality import measure_quality
from kimi_convert.validation.report import (
    ConsistencyReport,
    Finding,
    NotRun,
    QualityReport,
    Severity,
    ValidationReport,
)
from kimi_convert.validation.sample import (
    Sample,
    check_comparable,
    leading_tokens,
    random_tokens,
    read_sample,
)
from kimi_convert.validation.text_streams import converted_layers

# A checkpoint with such errors is not run: its numbers would say nothing.
_DAMAGE = (TENSORS, Check.VALUES)
_DEFAULTS = ValidationOptions()
# What is measured on a text; nothing of it without quality.
_MEASURED = frozenset(
    (Check.QUALITY, Check.ABLATION, Check.REPLACEMENT, Check.PROBES, Check.GREEDY)
)


def validate_checkpoint(
    checkpoint: str | Path,
    *,
    teacher: str | Path | None = None,
    text: str | Path | None = None,
    public_key: str | Path | None = None,
    options: ValidationOptions = _DEFAULTS,
    on_progress: ProgressCallback = ignore_progress,
    on_estimate: Callable[[Estimate], None] | None = None,
) -> ValidationReport:
    """Check that a checkpoint is whole and consistent, and measure what it is worth.

    What is wrong becomes a finding of the report. Quality is measured where there is a text; its
    numbers never make validation fail.

    Args:
        checkpoint: a folder of any supported architecture.
        teacher: the checkpoint that it was converted from, to compare with.
        text: a `.jsonl` or `.txt` file to measure on; without it, random tokens are run.
        public_key: the key that the folder must be signed with; None where that is not asked.
        options: which checks, on how much text, in which arithmetic.
        on_progress: told how far each part is.
        on_estimate: told, before any weight is searched or run, what that will take; None
            estimates nothing.

    Raises:
        ResourceError: one layer does not fit into memory, where that is estimated; or activations
            fit neither there nor on the disk.
        UsageError: there is no such device here, or the key cannot be used.
        KernelInputError: the backend cannot run there.
        ConfigError: a config.json is missing or not valid.
        CheckpointError: a folder is not a readable checkpoint, or teacher and checkpoint cannot
            be compared.
        InputError: the text or a tokenizer is not valid.
    """
    checkpoint = Path(checkpoint)
    teacher = None if teacher is None else Path(teacher)
    text = None if text is None else Path(text)
    _check_place(options)
    config = read_config(checkpoint)
    guide = None if teacher is None else read_config(teacher)
    if guide is not None:
        check_comparable(config, guide, where=teacher)
    configs = [config] if guide is None else [config, guide]
    sample = _sample(checkpoint, config, teacher=teacher, text=text, options=options)
    if on_estimate is not None:
        folders = [checkpoint] if teacher is None else [checkpoint, teacher]
        text_tokens = sample.facts.tokens if sample else 0
        need = memory_need(configs, options, text_tokens=text_tokens)
        on_estimate(
            estimate_validation(folders, configs, options, memory=need, text_tokens=text_tokens)
        )
        require_room(need, where=checkpoint)
    integrity, found = check_integrity(
        checkpoint, config, checks=options.checks, on_progress=on_progress
    )
    signed_files, forged = _signature(checkpoint, public_key)
    not_run = _not_run(
        options,
        sample,
        found,
        converted=converted_layers(config, guide),
        has_teacher=teacher is not None,
        too_large=too_large(configs, options),
    )
    skipped = {one.check for one in not_run}
    job = _Job(checkpoint, teacher, config, options, on_progress)
    consistency, inconsistent = (
        (None, ()) if Check.CONSISTENCY in skipped else _consistency(job, sample)
    )
    quality, unmeasured = (None, ()) if Check.QUALITY in skipped else _quality(job, sample)
    if quality is not None and Check.GREEDY not in skipped:
        quality = _with_greedy(job, sample, quality)
    return ValidationReport(
        checkpoint=str(checkpoint),
        model_type=config.model_type,
        teacher=None if teacher is None else str(teacher),
        integrity=integrity,
        consistency=consistency,
        quality=quality,
        text=sample.facts if sample else None,
        findings=(*found, *forged, *inconsistent, *unmeasured),
        not_run=not_run,
        options=options,
        environment=this_environment(),
        signed_files=signed_files,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """What every measurement needs."""

    checkpoint: Path
    teacher: Path | None
    config: ModelConfig
    options: ValidationOptions
    on_progress: ProgressCallback


def _check_place(options: ValidationOptions) -> None:
    """Refuse a device that is not there, and a backend that cannot run on it."""
    device = usable_device(options.device)
    resolve_backend(options.backend, where="validate", device=device, dtype=options.torch_dtype)


def _signature(
    checkpoint: Path, public_key: str | Path | None
) -> tuple[int | None, tuple[Finding, ...]]:
    """Return how many files are signed, if that is asked, or what is wrong with it."""
    if public_key is None:
        return None, ()
    try:
        return check_signature(checkpoint, Path(public_key)), ()
    except VerificationError as error:
        return None, (
            Finding(
                Severity.ERROR,
                "signature",
                error.where,
                error.message,
                error.expected,
                error.found,
            ),
        )


def _sample(
    checkpoint: Path,
    config: ModelConfig,
    *,
    teacher: Path | None,
    text: Path | None,
    options: ValidationOptions,
) -> Sample | None:
    if text is None:
        return None
    return read_sample(
        text,
        checkpoint=checkpoint,
        teacher=teacher,
        vocab_size=config.vocab_size,
        options=options,
    )


def _not_run(
    options: ValidationOptions,
    sample: Sample | None,
    found: Iterable[Finding],
    *,
    converted: frozenset[int],
    has_teacher: bool,
    too_large: str | None,
) -> tuple[NotRun, ...]:
    """Say which checks are not made; the first reason that holds is given."""
    damaged = any(
        finding.severity is Severity.ERROR and finding.check in _DAMAGE for finding in found
    )
    compared = () if has_teacher else {Check.REPLACEMENT, Check.GREEDY}
    reasons = (
        (frozenset(Check) - options.checks, "left out by the options"),
        ({Check.CONSISTENCY, *_MEASURED} if damaged else (), "the checkpoint is damaged"),
        (_MEASURED if sample is None else (), "no text was given"),
        ({Check.ABLATION} if not converted else (), "no teacher with other mixers was given"),
        (compared, "no teacher was given"),
        (() if too_large is None else {Check.GREEDY}, too_large or ""),
    )
    why: dict[Check, str] = {}
    for checks, reason in reasons:
        for check in checks:
            why.setdefault(check, reason)
    if Check.QUALITY in why:
        why |= {check: why[Check.QUALITY] for check in _MEASURED if check not in why}
    return tuple(NotRun(check, why[check]) for check in Check if check in why)


def _consistency(
    job: _Job, sample: Sample | None
) -> tuple[ConsistencyReport, tuple[Finding, ...]]:
    if sample is None:
        tokens, source = random_tokens(job.config.vocab_size, job.options), "random"
    else:
        tokens, source = leading_tokens(sample, job.options), "text"
    report = measure_consistency(
        job.checkpoint, tokens, source=source, options=job.options, on_progress=job.on_progress
    )
    return report, tuple(
        Finding(
            Severity.ERROR,
            Check.CONSISTENCY,
            str(job.checkpoint),
            f"{form.form} gives other logits than a chunked prefill",
            f"a relative error of at most {report.bound:.1e}",
            f"{form.max_relative_error:.1e}",
        )
        for form in report.forms
        if not form.passed
    )


def _quality(job: _Job, sample: Sample | None) -> tuple[QualityReport | None, tuple[Finding, ...]]:
    assert sample is not None
    try:
        report = measure_quality(
            job.checkpoint,
            sample.packed,
            teacher=job.teacher,
            options=job.options,
            on_progress=job.on_progress,
        )
    except VerificationError as error:
        return None, (
            Finding(Severity.ERROR, Check.QUALITY, error.where, error.message, found=error.found),
        )
    return report, ()


def _with_greedy(job: _Job, sample: Sample | None, quality: QualityReport) -> QualityReport:
    assert sample is not None
    assert job.teacher is not None
    greedy = measure_greedy(
        job.checkpoint,
        sample.packed.tokens[:, :-1],
        teacher=job.teacher,
        options=job.options,
        on_progress=job.on_progress,
    )
    return replace(quality, greedy=greedy)
