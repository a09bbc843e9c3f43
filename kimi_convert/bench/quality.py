"""Compare what hybrids start from, on held-out text: `python -m kimi_convert.bench.quality`.

    [--teacher DIR] [--calibration FILE] [--heldout FILE] [--device cuda] [--seeds N]
    [--align STEPS ...] [--align-rate RATE] [--align-step-tokens N]
    [--distill TOKENS] [--rate RATE] [--step-tokens N] [--written TOKENS]
    [--only PATTERN ...] [--processes N] [--json FILE]

Every row takes the same calibration tokens through the same later stages and is written as a bf16
checkpoint before it is measured. R is the share of the loss that switching the released pattern's
converted mixers off costs, and that a hybrid still has:

    R = (loss - loss of the teacher) / (loss switched off - loss of the teacher)

With --json, every run is written when it is measured, and what the file has already is not measured
again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from kimi_convert.bench.quality_floor import FLOORS, OFF, measure_floors
from kimi_convert.bench.quality_rows import stages, starts
from kimi_convert.bench.quality_run import Job, Setting, run_jobs
from kimi_convert.bench.quality_table import Results
from kimi_convert.checkpoints.examples import calibration_text, example_checkpoint, heldout_text
from kimi_convert.config.calibration import AlignRecipe, DistillRecipe
from kimi_convert.errors import KimiConvertError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table; exit codes are those of the command line."""
    given = _arguments(arguments)
    try:
        results = _run(given)
    except KimiConvertError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{line}\n" for line in results.table()))
    return 0


def _run(given: argparse.Namespace) -> Results:
    setting = Setting(
        teacher=given.teacher,
        calibration=given.calibration,
        heldout=given.heldout,
        device=given.device,
    )
    results = Results(setting, given.json)

    def wanted(name: str) -> bool:
        return not given.only or any(fnmatchcase(name, pattern) for pattern in given.only)

    floors = [
        name for name in FLOORS if (wanted(name) or name == OFF) and not results.has(name, 0)
    ]
    for name, teacher_loss, run in measure_floors(setting, floors):
        results.teacher_loss = teacher_loss
        results.add(name, run)
    training = DistillRecipe(
        tokens=given.distill,
        tokens_per_step=given.step_tokens,
        learning_rate=given.rate,
        written_tokens=given.written,
    )
    aligned = [
        AlignRecipe(
            steps=steps, tokens_per_step=given.align_step_tokens, learning_rate=given.align_rate
        )
        for steps in given.align
    ]
    jobs = [
        job
        for job in jobs_of(aligned, training, seeds=given.seeds)
        if wanted(job.name) and not results.has(job.name, job.seed)
    ]
    beside = {(job.undistilled, job.seed) for job in jobs}
    jobs = [job for job in jobs if (job.name, job.seed) not in beside]
    # The longest first, so that none is left alone at the end.
    jobs.sort(key=_length, reverse=True)
    for job, rows in run_jobs(setting, jobs, processes=given.processes):
        if isinstance(rows, str):
            sys.stderr.write(f"{job.name}, seed {job.seed}: {rows}\n")
            continue
        for name, run in rows.items():
            if not results.has(name, job.seed):
                results.add(name, run)
            sys.stderr.write(f"{name}, seed {job.seed}: KL {run.kl:.3f}, {run.seconds:.0f} s\n")
    return results


def jobs_of(align: Sequence[AlignRecipe], training: DistillRecipe, *, seeds: int) -> Iterator[Job]:
    """Yield every row with every seed."""
    all_stages = stages(align, training)
    before = all_stages[-1].undistilled.suffix
    for name, recipe in starts(all_stages):
        fitted = recipe.calibration
        distills = fitted is not None and fitted.distill.tokens > 0
        undistilled = name.removesuffix(all_stages[-1].suffix) + before if distills else None
        # A start without text has no seed but that of projections without effect.
        for seed in range(seeds if fitted else 1):
            yield Job(name=name, recipe=recipe, seed=seed, undistilled=undistilled)


def _length(job: Job) -> tuple[int, int]:
    fitted = job.recipe.calibration
    return (fitted.distill.tokens, fitted.align.steps) if fitted else (0, 0)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kimi_convert.bench.quality")
    parser.add_argument("--teacher", type=Path, default=example_checkpoint())
    parser.add_argument("--calibration", type=Path, default=calibration_text())
    parser.add_argument("--heldout", type=Path, default=heldout_text())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--align", type=int, nargs="*", default=[])
    parser.add_argument("--distill", type=int, default=0, metavar="TOKENS")
    usual, usually = DistillRecipe(), AlignRecipe()
    parser.add_argument("--align-rate", type=float, default=usually.learning_rate)
    parser.add_argument("--align-step-tokens", type=int, default=usually.tokens_per_step)
    parser.add_argument("--rate", type=float, default=usual.learning_rate)
    parser.add_argument("--step-tokens", type=int, default=usual.tokens_per_step)
    parser.add_argument("--written", type=int, default=usual.written_tokens, metavar="TOKENS")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
