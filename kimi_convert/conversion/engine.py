"""Carry out a plan: every file of weights is a job; what runs the jobs does not change a byte.

The output folder appears whole or not at all. Files of weights that are finished are noted in a
journal, so that an interrupted run can be resumed; the same plan gives the same bytes, resumed or
not, in one process, in several or on a cluster.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kimi_convert import __version__
from kimi_convert.checkpoints.clone import NOTHING_SHAREABLE
from kimi_convert.checkpoints.hashing import sha256_of_file
from kimi_convert.checkpoints.output import Output, open_output
from kimi_convert.checkpoints.written import WrittenFile, WrittenShard
from kimi_convert.config.huggingface import CONFIG_FILE, config_to_json
from kimi_convert.config.output_format import AS_SOURCE, OutputFormat
from kimi_convert.config.progress import ProgressCallback, ProgressEvent, ignore_progress
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.calibration.report import CalibrationReport
from kimi_convert.conversion.memory import require_memory
from kimi_convert.conversion.plan import (
    DEFAULT_MAX_SHARD_BYTES,
    ConversionPlan,
    plan_conversion,
)
from kimi_convert.conversion.provenance import CONVERSION_FILE, carried_files, provenance
from kimi_convert.conversion.runners import Runner, one_by_one
from kimi_convert.conversion.shard_job import Fit, ShardJob, ShardResult, shard_jobs

_STAGE = "converting"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionResult:
    """What a finished conversion wrote."""

    output: Path
    plan: ConversionPlan
    files: tuple[WrittenFile | WrittenShard, ...]
    seconds: float  # of the writing
    fit: CalibrationReport | None = None  # what the calibration reports

    def to_json(self) -> dict[str, object]:
        """Return the document that `convert --json` prints."""
        summary = self.plan.to_json()
        del summary["tensors"]
        return {
            **summary,
            "output": str(self.output),
            "seconds": round(self.seconds, 3),
            **({} if self.fit is None else {"calibration": self.fit.to_json()}),
            "files": [{"name": file.name, **file.to_json()} for file in self.files],
        }


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    recipe: Recipe | None = None,
    fit: Fit | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    output_format: OutputFormat = AS_SOURCE,
    resume: bool = False,
    runner: Runner = one_by_one,
    on_progress: ProgressCallback = ignore_progress,
) -> ConversionResult:
    """Carry out a recipe: write a Kimi-Linear hybrid into a new or empty folder.

    Args:
        source: config.json and safetensors of a full-attention MLA model.
        output: appears whole or not at all.
        recipe: None for a conversion without text. One with a calibration comes with its fit.
        fit: what the calibration of that recipe gave.
        max_shard_bytes: of each file of weights, its header included.
        output_format: how the result is stored, where not as the source.
        resume: go on from the files that an interrupted run has finished, if there are any.
        runner: what runs the jobs.
        on_progress: told of every tensor, in bytes written.

    Raises:
        ConfigError: the source cannot become a hybrid.
        CheckpointError: the source is not whole, has changed, or holds NaN or Inf.
        RecipeError: the recipe does not fit the model.
        OutputError: the output folder is taken, not apart from the source, or holds an
            interrupted run that is not to be resumed or was another conversion.
        ResourceError: the disk or the memory is full, or the folder cannot be written.
    """
    started = time.monotonic()
    source, output = Path(source), Path(output)
    recipe = recipe or Recipe()
    assert (recipe.calibration is not None) == (fit is not None)
    plan = plan_conversion(
        source, recipe, max_shard_bytes=max_shard_bytes, output_format=output_format
    )
    carried = carried_files(source)
    require_memory(plan, workers=runner.workers)
    with open_output(output, source=source, resume=resume) as target:
        copied = _write_weights(target, plan, fit, runner, carried, on_progress)
        for name in carried:
            target.copy_file(source / name)
        target.write_json(CONFIG_FILE, config_to_json(plan.target_config))
        target.write_index(plan.shards)
        report = None if fit is None else fit.report
        told = None if report is None else report.to_json()
        target.write_json(CONVERSION_FILE, provenance(plan, target.files, copied, told))
        return ConversionResult(
            output=target.folder,
            plan=plan,
            files=target.files,
            seconds=time.monotonic() - started,
            fit=report,
        )


def _write_weights(
    target: Output,
    plan: ConversionPlan,
    fit: Fit | None,
    runner: Runner,
    carried: tuple[str, ...],
    on_progress: ProgressCallback,
) -> dict[str, str]:
    """Write the files of weights that are missing; return the SHA-256 of what was copied."""
    states = _source_states(plan) if runner.in_place else {}  # what is fetched is always new
    finished = target.open_journal(run_digest(plan, fit), states)
    written = sum(one.written.nbytes for one in finished.values())
    small = sum((plan.source / name).stat().st_size for name in carried)
    copied = {name: one.notes for name, one in finished.items()}
    jobs = shard_jobs(plan, fit, target.path_of, tuple(finished))
    target.require_space(
        plan.write_bytes - written + small,
        plan.shareable(job.shard for job in jobs) if runner.in_place else NOTHING_SHAREABLE,
    )
    total = plan.shards.total_size
    before = total - sum(job.shard.data_bytes for job in jobs)

    def on_done(job: ShardJob, result: ShardResult) -> None:
        sources = {name: states[name] for name in job.index.shards if name in states}
        target.finish_shard(result.written, result.copied, sources)
        copied[job.shard.file_name] = result.copied

    def on_bytes(done: int, detail: str) -> None:
        on_progress(ProgressEvent(_STAGE, before + done, total, "bytes", detail))

    runner.run(jobs, on_done=on_done, on_bytes=on_bytes)
    on_bytes(total - before, "")
    return {
        name: digest
        for shard in plan.shards.shards
        for name, digest in copied[shard.file_name].items()
    }


def _source_states(plan: ConversionPlan) -> dict[str, str]:
    """Return, for each file of the source, what nobody can set back who writes over it.

    Rights, owner and links change it too: to tell these from other content takes reading the file,
    as does making anew what it became.
    """
    return {name: str(file.ctime_ns) for name, file in plan.index.shards.items()}


def run_digest(plan: ConversionPlan, fit: Fit | None) -> str:
    """Return the SHA-256 of everything that the files of weights depend on, in hex."""
    files: Mapping[str, object] = {
        name: (file.nbytes, file.mtime_ns) for name, file in sorted(plan.index.shards.items())
    }
    inputs = {
        "version": __version__,
        "config": sha256_of_file(plan.source / CONFIG_FILE),
        "source": files,
        "recipe": plan.recipe.to_json(),
        "fit": None if fit is None else fit.report.to_json(),
        "target": [(shard.file_name, shard.file_bytes) for shard in plan.shards.shards],
        "target_config": config_to_json(plan.target_config),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
