"""Write a checkpoint again as safetensors: in files of another size, in another dtype.

Tensors stream from the old files to the new ones; where the dtype stays, their bytes do too.
Names become those of the released format, config.json keeps every field it has, and what else a
loader needs is copied. Code is never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kimi_convert.checkpoints.clone import extents_of
from kimi_convert.checkpoints.dtypes import dtype_from_torch_name, torch_dtype
from kimi_convert.checkpoints.index import CheckpointIndex, open_index
from kimi_convert.checkpoints.mapping import Entry, Storage
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.output import Output, open_output
from kimi_convert.checkpoints.regular_file import CHUNK_BYTES
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.checkpoints.shard_plan import PlannedTensor, ShardPlan, plan_shards
from kimi_convert.checkpoints.shared_layout import share_layout, shareable
from kimi_convert.checkpoints.streaming import write_tensors
from kimi_convert.checkpoints.tensor_bytes import tensor_bytes
from kimi_convert.checkpoints.weight_reader import WeightReader, decoding_bytes
from kimi_convert.checkpoints.weights import Weight
from kimi_convert.checkpoints.written import WrittenFile, WrittenShard
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import (
    CONFIG_FILE,
    config_to_json,
    parse_config,
    read_json_object,
)
from kimi_convert.config.progress import ProgressCallback, ProgressEvent, ignore_progress
from kimi_convert.config.quantization import FIELD as QUANTIZATION
from kimi_convert.conversion.conversion_record import (
    CONVERSION_FILE,
    extend_conversion_record,
    read_conversion_record,
)
from kimi_convert.conversion.memory import PROCESS_BYTES, require_free_memory
from kimi_convert.errors import CheckpointError, UsageError
from kimi_convert.model.names.layout import WEIGHT_DTYPES, match_checkpoint
from kimi_convert.model.tokenizer import tokenizer_files

_STAGE = "writing weights"
_WIDEST_BYTES = 4  # of a new dtype, for each byte of a chunk of a narrow one
EXPORT_DTYPES = ("bfloat16", "float16", "float32")

# Beside the tokenizer: how to generate, and the terms that come with the weights.
_CARRIED_FILES = (
    "generation_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
    "NOTICE.txt",
)
# The correction bias decides between experts of nearly equal score: in bf16, values near 7 that
# spread by 0.25 fall together, and most choices change (sgl-project/sglang issue 37133).
_NEVER_NARROWED = frozenset({"layers.{layer}.moe.router.bias"})
_DTYPE_FIELDS = ("dtype", "torch_dtype")  # of config.json, new and old


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was written."""

    output: Path
    dtype: str  # of config.json, torch's name
    tensors: int
    nbytes: int  # of all tensors
    changed_dtype: tuple[str, ...]  # names of tensors
    renamed: Mapping[str, str]  # old name -> new name
    files: tuple[WrittenFile | WrittenShard, ...]

    def to_json(self) -> dict[str, object]:
        """Return the document that `export safetensors --json` prints."""
        files = {file.name: file.to_json() for file in self.files}
        return {
            "output": str(self.output),
            "dtype": self.dtype,
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "changed_dtype": list(self.changed_dtype),
            "renamed": dict(self.renamed),
            "files": files,
        }


def export_safetensors(
    checkpoint: str | Path,
    output: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    dtype: str | None = None,
    on_memory: Callable[[int], None] | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> ExportResult:
    """Write a checkpoint again into a new or empty folder; the same call gives the same bytes.

    Args:
        checkpoint: a folder of any supported architecture.
        output: appears whole or not at all.
        max_shard_bytes: of each file of weights, its header included.
        dtype: one of `EXPORT_DTYPES` for all weights, rounded to nearest even; None to keep each
            as it is. Tensors that the format stores in fp32 are fp32 either way, and the router's
            correction bias is never narrowed.
        on_memory: told, before anything is written, how many bytes the process holds at most.
        on_progress: told of every tensor, in bytes read.

    Raises:
        UsageError: no such dtype.
        ConfigError: config.json is missing or not valid.
        CheckpointError: the checkpoint is not whole, holds NaN or Inf, or holds a value that the
            new dtype cannot hold; the message names the tensor.
        OutputError: the output folder is taken, or not apart from the checkpoint.
        ResourceError: the disk or the memory is full, or the folder cannot be written.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise UsageError(
            "dtype is not valid", expected=" or ".join(EXPORT_DTYPES), found=repr(dtype)
        )
    stated = read_json_object(checkpoint / CONFIG_FILE)
    config = parse_config(stated, where=checkpoint / CONFIG_FILE)
    job = _plan(checkpoint, config, max_shard_bytes=max_shard_bytes, dtype=dtype)
    if on_memory is not None:
        on_memory(job.memory_bytes)
    require_free_memory(job.memory_bytes, what="the export", where=checkpoint)
    document = _document(stated, config, dtype)
    record = read_conversion_record(checkpoint)
    with open_output(output, source=checkpoint) as target:
        small = sum((checkpoint / name).stat().st_size for name in job.carried)
        shared = shareable(job.shards.shards, job.copies, job.index.shards)
        target.require_space(job.shards.file_bytes + small, shared)
        _write_weights(target, job, on_progress)
        for name in job.carried:
            target.copy_file(checkpoint / name)
        target.write_index(job.shards)
        target.write_json(CONFIG_FILE, document)
        if record is not None:
            changes = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, "renamed": job.renamed}
            extended = extend_conversion_record(record, target.files, changes=changes)
            target.write_json(CONVERSION_FILE, extended)
        return ExportResult(
            output=target.folder,
            dtype=str(document["dtype"]),
            tensors=len(job.tasks),
            nbytes=job.shards.total_size,
            changed_dtype=tuple(job.changed_dtype),
            renamed=job.renamed,
            files=target.files,
        )


@dataclass(frozen=True, slots=True)
class _Task:
    """One tensor: where it is read, and how it is written."""

    source: Weight
    planned: PlannedTensor

    @property
    def is_copy(self) -> bool:
        """Whether its bytes stay."""
        return self.source.quantization is None and self.source.dtype == self.planned.dtype


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything that will be written, known before the first byte."""

    index: CheckpointIndex
    tasks: Mapping[str, _Task]  # by the name that is written
    shards: ShardPlan
    copies: Mapping[str, TensorSpec]  # where bytes lie that stay as they are
    carried: tuple[str, ...]  # names of files that are copied

    @property
    def memory_bytes(self) -> int:
        """Bytes that the process holds, at most: one chunk as it is read, and in its new dtype."""
        read = max((decoding_bytes(task.source) for task in self.tasks.values()), default=0)
        return PROCESS_BYTES + read + _WIDEST_BYTES * CHUNK_BYTES

    @property
    def changed_dtype(self) -> list[str]:
        """Names of the tensors whose values are written in another dtype."""
        tasks = self.tasks.items()
        return [name for name, task in tasks if task.source.stored[0].dtype != task.planned.dtype]

    @property
    def renamed(self) -> dict[str, str]:
        """Old name -> new name, where they differ."""
        tasks = self.tasks.items()
        stored = {name: task.source.stored[0].name for name, task in tasks}
        return {
            stored[name]: name
            for name, task in tasks
            if task.source.quantization is None and stored[name] != name
        }


def _document(
    stated: Mapping[str, object], config: ModelConfig, dtype: str | None
) -> dict[str, object]:
    """Return config.json with every field it has, and those of the released format it lacks."""
    document = {name: value for name, value in stated.items() if name != QUANTIZATION}
    for name, value in config_to_json(replace(config, quantization=None)).items():
        document.setdefault(name, value)
    if dtype is not None:
        document |= {name: dtype for name in _DTYPE_FIELDS if name in document}
    return document


def _plan(
    checkpoint: Path, config: ModelConfig, *, max_shard_bytes: int, dtype: str | None
) -> _Job:
    index = open_index(checkpoint)
    matched = match_checkpoint(config, index.tensors.values(), where=checkpoint)
    if matched.multimodal:
        raise CheckpointError(
            "a multimodal checkpoint cannot be written again",
            where=checkpoint,
            expected="a text model",
            hint="`kimi-convert convert` takes its text model and leaves the rest out.",
        )
    wanted = None if dtype is None else dtype_from_torch_name(dtype)
    tasks: dict[str, _Task] = {}
    for entry in matched.entries:
        source = matched.weights[entry.param]
        target = _target_dtype(entry, source.dtype, wanted)
        tasks[entry.name] = _Task(source, PlannedTensor(entry.name, target, source.shape))
    # What nothing here reads may be read elsewhere: it goes along as it is, but not quantised.
    for source in matched.unread.values():
        tasks[source.name] = _Task(source, PlannedTensor(source.name, source.dtype, source.shape))
    shards = plan_shards([task.planned for task in tasks.values()], max_shard_bytes)
    copies = {name: task.source.stored[0] for name, task in tasks.items() if task.is_copy}
    shards = share_layout(shards, copies, max_shard_bytes)
    small = [name for name in _CARRIED_FILES if (checkpoint / name).is_file()]
    return _Job(index, tasks, shards, copies, (*tokenizer_files(checkpoint), *small))


def _target_dtype(entry: Entry, stored: str, wanted: str | None) -> str:
    """Return the safetensors dtype that a tensor is written in."""
    if entry.storage is Storage.FP32:
        return "F32"
    if wanted is None:
        return stored
    if entry.template in _NEVER_NARROWED:
        both = torch.promote_types(torch_dtype(stored), torch_dtype(wanted))
        return dtype_from_torch_name(str(both).removeprefix("torch."))
    return wanted


def _write_weights(target: Output, job: _Job, on_progress: ProgressCallback) -> None:
    read: dict[str, int] = {}  # bytes before each tensor
    done = 0
    for tensor in (tensor for shard in job.shards.shards for tensor in shard.tensors):
        read[tensor.name] = done
        done += job.tasks[tensor.name].source.stored_bytes

    def tell(name: str, _: int) -> None:
        on_progress(ProgressEvent(_STAGE, read[name], job.index.nbytes, "bytes", name))

    extents = extents_of(job.copies, job.index.shards)
    with WeightReader(job.index) as reader:
        for shard in job.shards.shards:
            chunks = (_chunks(reader, job.tasks[tensor.name]) for tensor in shard.tensors)
            with target.shard(shard, extents) as writer:
                write_tensors(writer, chunks, on_tensor=tell)
    on_progress(ProgressEvent(_STAGE, done, job.index.nbytes, "bytes"))


def _chunks(reader: WeightReader, task: _Task) -> Iterator[memoryview]:
    """Give a tensor's bytes in its new dtype; refuse values that are not finite there."""
    source, target = torch_dtype(task.source.dtype), torch_dtype(task.planned.dtype)
    for chunk in reader.chunks(task.source):
        if task.source.dtype not in WEIGHT_DTYPES:
            yield chunk
            continue
        before = torch.frombuffer(chunk, dtype=source)
        after = before.to(target)
        if not _is_finite(after):
            raise _not_finite(reader.index, task, overflows=_is_finite(before))
        yield chunk if source is target else tensor_bytes(after)


def _is_finite(values: torch.Tensor) -> bool:
    low, high = values.aminmax()  # NaN spreads to both
    return bool(low.isfinite() and high.isfinite())


def _not_finite(index: CheckpointIndex, task: _Task, *, overflows: bool) -> CheckpointError:
    where = index.shards[task.source.stored[0].shard].path
    name = quoted(task.source.name)
    if overflows:
        largest = torch.finfo(torch_dtype(task.planned.dtype)).max
        return CheckpointError(
            f"tensor {name} holds values that {task.planned.dtype} cannot hold",
            where=where,
            expected=f"at most {largest:g} in size",
            hint="Choose bfloat16 or float32.",
        )
    return CheckpointError(
        f"tensor {name} holds values that are not finite",
        where=where,
        found="NaN or Inf",
        hint="Download the checkpoint again; if it was trained, the training diverged.",
    )
