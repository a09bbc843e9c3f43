"""Carry out a plan: read, transform, write, free, tensor by tensor in the order of the files.

What is copied streams through one buffer; what is made is in memory alone, with its sources.
The output folder appears whole or not at all, and the same plan gives the same bytes, however
many threads torch has.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from kimi_convert.checkpoints.dtypes import torch_dtype
from kimi_convert.checkpoints.output import CONFIG_FILE, Output, open_output
from kimi_convert.checkpoints.shard_plan import PlannedShard
from kimi_convert.checkpoints.tensor_bytes import tensor_bytes
from kimi_convert.checkpoints.weight_reader import WeightReader
from kimi_convert.checkpoints.writer import WrittenFile
from kimi_convert.config.huggingface import config_to_json
from kimi_convert.config.progress import ProgressCallback, ProgressEvent, ignore_progress
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.calibration.report import CalibrationReport
from kimi_convert.conversion.plan import (
    DEFAULT_MAX_SHARD_BYTES,
    ConversionPlan,
    TensorTask,
    plan_conversion,
)
from kimi_convert.conversion.provenance import (
    CONVERSION_FILE,
    SourceHashes,
    carried_files,
    provenance,
)
from kimi_convert.conversion.rules import Op
from kimi_convert.conversion.source_values import finite_chunks, not_finite_error
from kimi_convert.conversion.transforms import TRANSFORMS, Job
from kimi_convert.errors import CheckpointError

_STAGE = "converting"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionResult:
    """What a finished conversion wrote."""

    output: Path
    plan: ConversionPlan
    files: tuple[WrittenFile, ...]
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
            "files": [
                {"name": file.name, "size": file.nbytes, "sha256": file.sha256}
                for file in self.files
            ],
        }


class Fit(Protocol):
    """What a calibration gives a conversion."""

    @property
    def report(self) -> CalibrationReport:
        """What goes into conversion.json."""
        ...

    def parameter(self, layer_idx: int, name: str) -> torch.Tensor:
        """Return one fitted parameter, fp32, by its name in the layer: "kda.q.weight"."""
        ...


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    recipe: Recipe | None = None,
    fit: Fit | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    on_progress: ProgressCallback = ignore_progress,
) -> ConversionResult:
    """Carry out a recipe: write a Kimi-Linear hybrid into a new or empty folder.

    Args:
        source: config.json and safetensors of a full-attention MLA model.
        output: appears whole or not at all.
        recipe: None for a conversion without text. One with a calibration comes with its fit.
        fit: what the calibration of that recipe gave.
        max_shard_bytes: of each file of weights, its header included.
        on_progress: told of every tensor, in bytes written.

    Raises:
        ConfigError: the source cannot become a hybrid.
        CheckpointError: the source is not whole, or holds NaN or Inf; nothing is left behind.
        RecipeError: the recipe does not fit the model.
        OutputError: the output folder is taken, or not apart from the source.
        ResourceError: the disk is full or cannot be written.
    """
    started = time.monotonic()
    source, output = Path(source), Path(output)
    recipe = recipe or Recipe()
    assert (recipe.calibration is not None) == (fit is not None)
    plan = plan_conversion(source, recipe, max_shard_bytes=max_shard_bytes)
    carried = carried_files(source)
    with open_output(output, source=source) as target, WeightReader(plan.index) as reader:
        target.require_space(
            plan.write_bytes + sum((source / name).stat().st_size for name in carried)
        )
        hashes = _Worker(plan, reader, fit, on_progress).write_weights(target)
        for name in carried:
            target.copy_file(source / name)
        target.write_json(CONFIG_FILE, config_to_json(plan.target_config))
        target.write_index(plan.shards)
        report = None if fit is None else fit.report
        told = None if report is None else report.to_json()
        target.write_json(CONVERSION_FILE, provenance(plan, target.files, hashes, told))
        return ConversionResult(
            output=target.folder,
            plan=plan,
            files=target.files,
            seconds=time.monotonic() - started,
            fit=report,
        )


class _Worker:
    """Writes the files of weights of one plan."""

    def __init__(
        self,
        plan: ConversionPlan,
        reader: WeightReader,
        fit: Fit | None,
        on_progress: ProgressCallback,
    ) -> None:
        self._plan = plan
        self._fit = fit
        self._reader = reader
        self._on_progress = on_progress
        self._tasks = {task.tensor.name: task for task in plan.tasks}
        self._done_bytes = 0

    def write_weights(self, target: Output) -> SourceHashes:
        """Write every file; return the SHA-256 of every tensor that was copied."""
        copied: dict[str, str] = {}
        for shard in self._plan.shards.shards:
            copied |= self._write_shard(target, shard)
        self._report("")
        return copied

    def _write_shard(self, target: Output, shard: PlannedShard) -> dict[str, str]:
        copied: dict[str, str] = {}
        with target.shard(shard) as writer:
            for tensor in shard.tensors:
                task = self._tasks[tensor.name]
                self._report(tensor.name)
                if task.op in (Op.COPY, Op.DEQUANTIZE):
                    weight = self._plan.weights[task.sources[0]]
                    chunks = finite_chunks(self._reader, weight, self._plan.source)
                    digest = writer.write(tensor.name, chunks)
                    if task.op is Op.COPY:
                        copied[weight.stored[0].name] = digest
                else:
                    writer.write(tensor.name, self._made(task))
                self._done_bytes += tensor.nbytes
        return copied

    def _made(self, task: TensorTask) -> memoryview:
        """Return the bytes of a tensor that is computed; its sources are freed before."""
        made = self._fitted(task) if task.op is Op.FITTED else self._transformed(task)
        stored = made.to(torch_dtype(task.tensor.dtype))
        if not bool(stored.isfinite().all()):
            raise CheckpointError(
                f"tensor {task.tensor.name!r} cannot be stored as {task.tensor.dtype}",
                where=self._plan.source,
                expected="finite values",
                found=f"values up to {made.abs().max().item():.3g}",
                hint="Lower the gains of the recipe, or convert from a bf16 or fp32 copy.",
            )
        self._reader.release()
        return tensor_bytes(stored)

    def _fitted(self, task: TensorTask) -> torch.Tensor:
        assert self._fit is not None
        assert task.layer_idx is not None
        name = task.param.removeprefix(f"layers.{task.layer_idx}.")
        return self._fit.parameter(task.layer_idx, name).reshape(task.tensor.shape).contiguous()

    def _transformed(self, task: TensorTask) -> torch.Tensor:
        sources = tuple(self._wide(name) for name in task.sources)
        job = Job(
            sources=sources,
            shape=task.tensor.shape,
            target=task.param,
            config=self._plan.source_config,
            recipe=self._plan.recipe,
        )
        with _one_thread():
            return TRANSFORMS[task.op](job)

    def _wide(self, name: str) -> torch.Tensor:
        tensor = self._reader.tensor(self._plan.weights[name]).float()
        if not bool(tensor.isfinite().all()):
            raise not_finite_error(name, self._plan.source)
        return tensor

    def _report(self, name: str) -> None:
        total = self._plan.shards.total_size
        self._on_progress(ProgressEvent(_STAGE, self._done_bytes, total, "bytes", name))


@contextmanager
def _one_thread() -> Generator[None]:
    """Keep products on one core: how many share one decides in which order it is summed up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
