"""Write a hybrid anew: what was not trained keeps its bytes, and everything its name and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_convert.checkpoints.clone import Shareable, extents_of
from kimi_convert.checkpoints.dtypes import torch_dtype
from kimi_convert.checkpoints.index import CheckpointIndex, open_index
from kimi_convert.checkpoints.mapping import Entry, Storage
from kimi_convert.checkpoints.output import Output
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.checkpoints.shard_plan import PlannedTensor, ShardPlan, plan_shards
from kimi_convert.checkpoints.shared_layout import share_layout, shareable
from kimi_convert.checkpoints.streaming import write_tensors
from kimi_convert.checkpoints.tensor_bytes import tensor_bytes
from kimi_convert.checkpoints.weight_reader import WeightReader
from kimi_convert.checkpoints.weights import Weight
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import CONFIG_FILE
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.provenance import carried_files
from kimi_convert.conversion.rules import is_trained
from kimi_convert.model.names.layout import MatchedCheckpoint, match_checkpoint

# (layer, name in it, as "kda.q.weight"), or (None, name) outside of layers -> the parameter
NewParameter = Callable[[int | None, str], torch.Tensor]

_STAGE = "writing weights"


@dataclass(frozen=True, slots=True)
class Rewriting:
    """A hybrid that is written anew."""

    folder: Path  # of the student
    index: CheckpointIndex
    matched: MatchedCheckpoint
    entries: Mapping[str, Entry]  # by the name that is written
    shards: ShardPlan
    copies: Mapping[str, TensorSpec]  # where the bytes lie that stay, by name

    @property
    def shareable(self) -> Shareable:
        """What of the files can have the student's blocks instead of room."""
        return shareable(self.shards.shards, self.copies, self.index.shards)


def plan_rewriting(
    student: Path, config: ModelConfig, max_shard_bytes: int, *, everything: bool
) -> Rewriting:
    """Plan the files of weights; only config and headers are read.

    Args:
        student: folder of the hybrid.
        config: its config.
        max_shard_bytes: of each file of weights, its header included.
        everything: whether more than the mixers is new.

    Raises:
        CheckpointError: the student is not whole.
    """
    index = open_index(student)
    matched = match_checkpoint(config, index.tensors.values(), where=student)
    entries = {entry.name: entry for entry in matched.entries}
    planned = [
        PlannedTensor(name, _dtype(entry, matched.weights[entry.param]), entry.shape)
        for name, entry in entries.items()
    ]
    copies = {
        name: matched.weights[entry.param].stored[0]
        for name, entry in entries.items()
        if not is_trained(entry.template, everything=everything)
    }
    shards = share_layout(plan_shards(planned, max_shard_bytes), copies, max_shard_bytes)
    return Rewriting(student, index, matched, entries, shards, copies)


def _dtype(entry: Entry, weight: Weight) -> str:
    """Return what a tensor is written in; the formats have fp32 for parameters of mixers alone."""
    return "F32" if entry.storage is Storage.FP32 else weight.dtype


def write_weights(
    target: Output,
    job: Rewriting,
    new: NewParameter,
    on_progress: ProgressCallback,
) -> None:
    """Write the weights and all that is carried over, but the record of the conversion.

    Args:
        target: an open output.
        job: the plan.
        new: gives new parameters.
        on_progress: told of bytes.
    """
    total, before = job.shards.total_size, 0
    extents = extents_of(job.copies, job.index.shards)
    with WeightReader(job.index) as reader:
        for shard in job.shards.shards:
            chunks = (_bytes_of(job, tensor, reader, new) for tensor in shard.tensors)

            def tell(name: str, done: int, before: int = before) -> None:
                on_progress(ProgressEvent(_STAGE, before + done, total, "bytes", name))

            with target.shard(shard, extents) as writer:
                write_tensors(writer, chunks, on_tensor=tell)
            before += shard.data_bytes
    on_progress(ProgressEvent(_STAGE, total, total, "bytes"))
    for name in (CONFIG_FILE, *carried_files(job.folder)):
        target.copy_file(job.folder / name)
    target.write_index(job.shards)


def _bytes_of(
    job: Rewriting, tensor: PlannedTensor, reader: WeightReader, new: NewParameter
) -> Iterator[memoryview]:
    entry = job.entries[tensor.name]
    if tensor.name in job.copies:
        return reader.chunks(job.matched.weights[entry.param])
    made = new(entry.layer_idx, entry.param.removeprefix(f"layers.{entry.layer_idx}."))
    stored = made.to(torch_dtype(tensor.dtype)).reshape(entry.shape).contiguous()
    return iter((tensor_bytes(stored),))
