"""One row of the quality bench with one seed: convert, write, measure the written checkpoint."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kimi_convert.config.calibration import AlignRecipe
from kimi_convert.config.progress import ProgressEvent
from kimi_convert.config.recipe import Recipe, with_training
from kimi_convert.conversion import convert_checkpoint
from kimi_convert.conversion.align_stages import AlignRequest
from kimi_convert.conversion.aligned import align_checkpoint
from kimi_convert.errors import KimiConvertError, VerificationError
from kimi_convert.validation import Check, ValidationOptions, validate_checkpoint

TOKENS_PER_KIND = 10_240
LENGTH = 512
_TOLD_EVERY = 30.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One row with one seed."""

    seed: int
    loss: float  # nats per token
    kl: float
    top1: float
    copied: float | None = None  # share of the tokens of a repeated random span
    teacher_copied: float | None = None  # by the teacher
    calibration_kl: float | None = None  # on the validation tokens of the calibration text
    kept: Sequence[int] = ()
    distilled: Mapping[str, object] | None = None  # losses, and validation on the way
    stages: Mapping[str, float] | None = None  # seconds of each
    seconds: float  # of the conversion

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all rows share."""

    teacher: Path
    calibration: Path
    heldout: Path
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row with one seed, and the row before its distillation, which costs nothing more."""

    name: str
    recipe: Recipe
    seed: int
    undistilled: str | None = None


def run_jobs(
    setting: Setting, jobs: Sequence[Job], *, processes: int
) -> Iterator[tuple[Job, dict[str, Measured] | str]]:
    """Measure jobs in processes of their own; yield their rows as they finish, or why one failed."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    pool = ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
    )
    with pool:
        running = {pool.submit(measure, setting, job): job for job in jobs}
        for future in as_completed(running):
            try:
                yield running[future], future.result()
            except (KimiConvertError, RuntimeError, BrokenProcessPool) as error:
                yield running[future], f"{type(error).__name__}: {error}"


def measure(setting: Setting, job: Job) -> dict[str, Measured]:
    """Convert by a recipe, distil if it says so, and measure the checkpoints; return rows by name."""
    recipe = replace(job.recipe, seed=job.seed)
    distills = recipe.calibration is not None and recipe.calibration.distill.steps > 0
    clock = StageClock(f"{job.name}, seed {job.seed}")
    found: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "hybrid"
        started = time.monotonic()
        fit = convert_checkpoint(
            setting.teacher,
            output,
            recipe=with_training(recipe, distill_tokens=0) if distills else recipe,
            text=setting.calibration,
            device=setting.device,
            on_progress=clock,
        ).fit
        seconds = time.monotonic() - started
        row = Measured(
            seed=job.seed,
            **_scores(setting, output, job.seed),
            calibration_kl=None if fit is None else fit.validation.kl,
            kept=() if fit is None else fit.kept,
            stages=dict(clock.seconds),
            seconds=seconds,
        )
        if not distills:
            return {job.name: row}
        if job.undistilled is not None:
            found[job.undistilled] = row
            sys.stderr.write(f"{job.undistilled}, seed {job.seed}: {row}\n")
        assert recipe.calibration is not None
        calibration = replace(recipe.calibration, align=AlignRecipe())
        started = time.monotonic()
        clock.resume()
        aligned = align_checkpoint(
            setting.teacher,
            output,
            Path(folder) / "distilled",
            request=AlignRequest(calibration=calibration, seed=job.seed, text=setting.calibration),
            device=setting.device,
            on_progress=clock,
        )
        seconds += time.monotonic() - started
        assert aligned is not None
        found[job.name] = replace(
            row,
            **_scores(setting, aligned.output, job.seed),
            calibration_kl=aligned.after.kl,
            distilled=aligned.distilled,
            stages=dict(clock.seconds),
            seconds=seconds,
        )
    return found


def _scores(setting: Setting, checkpoint: Path, seed: int) -> dict[str, Any]:
    """Return what is measured of a checkpoint on held-out text."""
    report = validate_checkpoint(
        checkpoint,
        teacher=setting.teacher,
        text=setting.heldout,
        options=ValidationOptions(
            checks=frozenset({Check.QUALITY, Check.PROBES}),
            sequence_length=LENGTH,
            max_tokens_per_kind=TOKENS_PER_KIND,
            device=setting.device,
            seed=seed,
        ),
    )
    assert report.quality is not None
    scores = report.quality.student.overall
    if scores.kl is None or scores.top1_agreement is None:
        raise VerificationError("the validation compared nothing", where=checkpoint)
    (copying,) = [probe for probe in report.quality.probes if probe.name == "copying"]
    return {
        "loss": scores.loss,
        "kl": scores.kl,
        "top1": scores.top1_agreement,
        "copied": copying.student,
        "teacher_copied": copying.teacher,
    }


class StageClock:
    """Adds up what the stages of a conversion take, and tells of long ones on the way."""

    def __init__(self, name: str) -> None:
        """Start the first stage."""
        self.seconds: dict[str, float] = {}
        self._name = name
        self._last = time.monotonic()
        self._told = self._last

    def resume(self) -> None:
        """Leave out what has passed since the last event."""
        self._last = time.monotonic()

    def __call__(self, event: ProgressEvent) -> None:
        """Count the time since the last event to this one's stage."""
        now = time.monotonic()
        self.seconds[event.stage] = self.seconds.get(event.stage, 0.0) + now - self._last
        self._last = now
        if now - self._told > _TOLD_EVERY:
            self._told = now
            done = f"{event.done} of {event.total} {event.detail}"
            sys.stderr.write(f"{self._name}: {event.stage}, {done}\n")
