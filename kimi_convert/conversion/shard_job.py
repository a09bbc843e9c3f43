"""One file of weights, made by one worker: the same function in this process, in another, on Ray.

A job holds all that its file needs and nothing of the rest of the plan, so that it is small enough
to be sent to another machine. What is copied or decoded streams through; what is made is in memory
alone, with its sources. The same job gives the same bytes, however many threads torch has.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from kimi_convert.checkpoints.clone import extents_of
from kimi_convert.checkpoints.dtypes import torch_dtype
from kimi_convert.checkpoints.encoding import encode_fp8
from kimi_convert.checkpoints.finite import FLOATS, find_non_finite
from kimi_convert.checkpoints.index import CheckpointIndex
from kimi_convert.checkpoints.reader import ShardProvider
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.checkpoints.shard_plan import PlannedShard
from kimi_convert.checkpoints.streaming import OnTensor, ignore_tensor, write_tensors
from kimi_convert.checkpoints.tensor_bytes import tensor_bytes
from kimi_convert.checkpoints.weight_reader import WeightReader
from kimi_convert.checkpoints.weights import Weight
from kimi_convert.checkpoints.writer import ShardWriter
from kimi_convert.checkpoints.written import WrittenShard
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.quantization import FP8_TILE
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.calibration.report import CalibrationReport
from kimi_convert.conversion.memory import memory_bytes
from kimi_convert.conversion.plan import ConversionPlan
from kimi_convert.conversion.rules import Op
from kimi_convert.conversion.source_values import finite_chunks, not_finite_error
from kimi_convert.conversion.tasks import TensorTask, copies
from kimi_convert.conversion.transforms import TRANSFORMS, Job
from kimi_convert.errors import CheckpointError

PART_SUFFIX = ".part"  # of a file that is not finished


class Fit(Protocol):
    """What a calibration gives a conversion."""

    @property
    def report(self) -> CalibrationReport:
        """What goes into conversion.json."""
        ...

    def parameter(self, layer_idx: int | None, name: str) -> torch.Tensor:
        """Return one fitted parameter, fp32, by its name in the layer, "kda.q.weight", or outside."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """One file of weights to be written, with all that its tensors are made from."""

    shard: PlannedShard
    path: Path  # where it will be
    tasks: tuple[TensorTask, ...]  # in the order of the file
    weights: Mapping[str, Weight]  # those that the tasks read, by name
    index: CheckpointIndex  # with the files that hold them
    config: ModelConfig  # of the source
    recipe: Recipe
    fit: Fit | None
    memory_bytes: int  # of this job alone in a process, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What one job wrote."""

    written: WrittenShard
    copied: Mapping[str, str]  # source tensors that were copied, with the SHA-256 of their bytes


def shard_jobs(
    plan: ConversionPlan, fit: Fit | None, path_of: Callable[[str], Path], done: Sequence[str] = ()
) -> tuple[ShardJob, ...]:
    """Cut a plan into the jobs that are left to do, in the order of the files.

    Args:
        plan: what is to be written.
        fit: what a calibration gave, if the plan has one.
        path_of: where a file is written, by its name.
        done: names of files that are finished.
    """
    tasks = {task.tensor.name: task for task in plan.tasks}
    jobs: list[ShardJob] = []
    for shard in plan.shards.shards:
        if shard.file_name in done:
            continue
        own = tuple(tasks[tensor.name] for tensor in shard.tensors)
        weights = {name: plan.weights[name] for task in own for name in task.sources}
        stored = {part.name: part for weight in weights.values() for part in weight.stored}
        files = {part.shard: plan.index.shards[part.shard] for part in stored.values()}
        jobs.append(
            ShardJob(
                shard=shard,
                path=path_of(shard.file_name),
                tasks=own,
                weights=weights,
                index=CheckpointIndex(plan.index.folder, stored, files),
                config=plan.source_config,
                recipe=plan.recipe,
                fit=fit,
                memory_bytes=memory_bytes(plan, own),
            )
        )
    return tuple(jobs)


def write_shard(
    job: ShardJob,
    *,
    on_tensor: OnTensor = ignore_tensor,
    provider: ShardProvider | None = None,
) -> ShardResult:
    """Write one file of weights, durably.

    Raises:
        CheckpointError: the source has changed, or holds NaN, Inf or parts that are not valid.
        ResourceError: the disk is full or cannot be written.
    """
    carried = copies(job.tasks, job.weights)
    # A file that is fetched is not there before it is read.
    extents = extents_of(carried if provider is None else {}, job.index.shards)
    try:
        with (
            WeightReader(job.index, provider) as reader,
            ShardWriter(job.path, job.shard, extents) as writer,
        ):
            write_tensors(
                writer,
                _Maker(job, reader).tensors(),
                on_tensor=on_tensor,
                beside=provider is None,
            )
            written = writer.finish()
            hashes = written.tensor_sha256
            copied = {stored.name: hashes[name] for name, stored in carried.items()}
            return ShardResult(written=written, copied=copied)
    except BaseException:
        job.path.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes the bytes of the tensors of one job."""

    job: ShardJob
    reader: WeightReader

    def tensors(self) -> Generator[Iterator[memoryview]]:
        """Give the chunks of every tensor in order.

        One thread decodes as fast as two hash, and how many share a product decides in which
        order it is summed up.
        """
        with _one_thread():
            for task in self.job.tasks:
                yield self._chunks(task)

    def _chunks(self, task: TensorTask) -> Iterator[memoryview]:
        if task.op is Op.COPY:
            stored = self.job.weights[task.sources[0]].stored[task.part]
            return self._copied(stored)
        if task.op is Op.QUANTIZE:
            return self._quantized(task)
        if task.op is Op.DEQUANTIZE:
            weight = self.job.weights[task.sources[0]]
            return finite_chunks(self.reader, weight, self.job.index.folder)
        return iter((self._made(task),))

    def _quantized(self, task: TensorTask) -> Iterator[memoryview]:
        """Give the values or the scales of a weight in FP8 blocks."""
        weight = self.job.weights[task.sources[0]]
        for rows in self.reader.rows(weight, multiple=FP8_TILE):
            if not _is_finite(rows):
                raise not_finite_error(weight.name, self.job.index.folder)
            yield tensor_bytes(encode_fp8(rows)[task.part])

    def _copied(self, stored: TensorSpec) -> Iterator[memoryview]:
        """Give the bytes of a stored tensor, each chunk checked for NaN and Inf on its way."""
        for chunk in self.reader.stored_chunks(stored):
            if stored.dtype in FLOATS and find_non_finite(chunk, stored.dtype) is not None:
                raise not_finite_error(stored.name, self.job.index.folder)
            yield chunk

    def _made(self, task: TensorTask) -> memoryview:
        """Return the bytes of a tensor that is computed; its sources are freed before."""
        made = self._fitted(task) if task.op is Op.FITTED else self._transformed(task)
        stored = made.to(torch_dtype(task.tensor.dtype))
        if not _is_finite(stored):
            raise CheckpointError(
                f"tensor {task.tensor.name!r} cannot be stored as {task.tensor.dtype}",
                where=self.job.index.folder,
                expected="finite values",
                found=f"values up to {made.abs().max().item():.3g}",
                hint="Lower the gains of the recipe, or convert from a bf16 or fp32 copy.",
            )
        return tensor_bytes(stored)

    def _fitted(self, task: TensorTask) -> torch.Tensor:
        assert self.job.fit is not None
        name = task.param.removeprefix(f"layers.{task.layer_idx}.")
        made = self.job.fit.parameter(task.layer_idx, name)
        return made.reshape(task.tensor.shape).contiguous()

    def _transformed(self, task: TensorTask) -> torch.Tensor:
        sources = tuple(self._wide(name) for name in task.sources)
        job = Job(
            sources=sources,
            shape=task.tensor.shape,
            target=task.param,
            config=self.job.config,
            recipe=self.job.recipe,
        )
        return TRANSFORMS[task.op](job)

    def _wide(self, name: str) -> torch.Tensor:
        tensor = self.reader.wide(self.job.weights[name])
        if not _is_finite(tensor):
            raise not_finite_error(name, self.job.index.folder)
        return tensor


def _is_finite(values: torch.Tensor) -> bool:
    """Tell whether all are, without a copy: NaN spreads to both ends."""
    low, high = values.aminmax()
    return bool(low.isfinite() and high.isfinite())


@contextmanager
def _one_thread() -> Generator[None]:
    """Keep torch on the thread that calls it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
