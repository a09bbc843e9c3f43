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

import torch

from kimi_convert.config.progress import ProgressEvent
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion import convert_checkpoint
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
    """One row with one seed."""

    name: str
    recipe: Recipe
    seed: int


def run_jobs(
    setting: Setting, jobs: Sequence[Job], *, processes: int
) -> Iterator[tuple[Job, Measured | str]]:
    """Measure jobs in processes of their own; yield them as they finish, or why one failed."""
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


def measure(setting: Setting, job: Job) -> Measured:
    """Convert by a recipe, and measure the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "hybrid"
        started = time.monotonic()
        clock = StageClock(f"{job.name}, seed {job.seed}")
        result = convert_checkpoint(
            setting.teacher,
            output,
            recipe=replace(job.recipe, seed=job.seed),
            text=setting.calibration,
            device=setting.device,
            on_progress=clock,
        )
        seconds = time.monotonic() - started
        report = validate_checkpoint(
            output,
            teacher=setting.teacher,
            text=setting.heldout,
            options=ValidationOptions(
                checks=frozenset({Check.QUALITY, Check.PROBES}),
                sequence_length=LENGTH,
                max_tokens_per_kind=TOKENS_PER_KIND,
                device=setting.device,
                seed=job.seed,
            ),
        )
    assert report.quality is not None
    scores = report.quality.student.overall
    if scores.kl is None or scores.top1_agreement is None:
        raise VerificationError("the validation compared nothing", where=output)
    fit = result.fit
    (copying,) = [probe for probe in report.quality.probes if probe.name == "copying"]
    return Measured(
        seed=job.seed,
        loss=scores.loss,
        kl=scores.kl,
        top1=scores.top1_agreement,
        copied=copying.student,
        teacher_copied=copying.teacher,
        calibration_kl=None if fit is None else fit.validation.kl,
        kept=() if fit is None else fit.kept,
        distilled=None if fit is None else fit.distilled,
        stages=clock.seconds,
        seconds=seconds,
    )


class StageClock:
    """Adds up what the stages of a conversion take, and tells of long ones on the way."""

    def __init__(self, name: str) -> None:
        """Start the first stage."""
        self.seconds: dict[str, float] = {}
        self._name = name
        self._last = time.monotonic()
        self._told = self._last

    def __call__(self, event: ProgressEvent) -> None:
        """Count the time since the last event to this one's stage."""
        now = time.monotonic()
        self.seconds[event.stage] = self.seconds.get(event.stage, 0.0) + now - self._last
        self._last = now
        if now - self._told > _TOLD_EVERY:
            self._told = now
            done = f"{event.done} of {event.total} {event.detail}"
            sys.stderr.write(f"{self._name}: {event.stage}, {done}\n")
