"""What a validation will take, said before it starts: memory from the config, time from a probe.

Time is what there is to read at the speed of this disk, and what there is to multiply at the speed of
this processor, both tried out on a little of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.model.names.layout import expected_entries
from kimi_convert.validation.memory_need import (
    CONSISTENCY_SEQUENCES,
    FORMS,
    MemoryNeed,
    entry_size,
    num_streams,
)
from kimi_convert.validation.options import Check, ValidationOptions

_PROBE_BYTES = 64 * 1024 * 1024
_PROBE_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Before the first layer is loaded."""

    memory: MemoryNeed
    read_bytes: int  # from files, all passes together
    passes: int
    bytes_per_second: float  # measured here, on this checkpoint
    operations: int  # multiplications and additions
    operations_per_second: float  # measured here

    @property
    def seconds(self) -> float:
        """Reading and multiplying, one after the other."""
        reading = self.read_bytes / self.bytes_per_second
        return reading + self.operations / self.operations_per_second


def estimate_validation(
    folders: Sequence[Path],
    configs: Sequence[ModelConfig],
    options: ValidationOptions,
    *,
    memory: MemoryNeed,
    text_tokens: int,
) -> Estimate:
    """Look at configs and headers, and try the disk and the processor for a moment.

    Args:
        folders: the checkpoint and, if it has one, its teacher.
        configs: theirs.
        options: of the validation.
        memory: what it takes.
        text_tokens: that quality is measured on; 0 where it is not.

    Raises:
        CheckpointError: a folder is not a readable checkpoint.
    """
    checkpoint, config, dtype = folders[0], configs[0], options.torch_dtype
    measured = text_tokens > 0 and Check.QUALITY in options.checks
    scanned = not options.checks.isdisjoint({Check.VALUES, Check.HASHES})
    compared = Check.CONSISTENCY in options.checks
    passes = int(scanned) + int(compared) + int(measured)
    read = passes * open_index(checkpoint).nbytes
    if measured:
        read += sum(open_index(folder).nbytes for folder in folders[1:])
    tokens = CONSISTENCY_SEQUENCES * options.consistency_tokens * FORMS * int(compared)
    tokens += num_streams(configs) * text_tokens * int(measured)
    return Estimate(
        memory=memory,
        read_bytes=read,
        passes=passes,
        bytes_per_second=_reading_speed(checkpoint, dtype, device=options.device),
        operations=2 * active_parameters(config) * tokens,
        operations_per_second=_multiplying_speed(config, dtype, device=options.device),
    )


def active_parameters(config: ModelConfig) -> int:
    """Return how many weights a token meets: of the routed experts, those that it chooses."""
    moe = config.moe
    share = 1.0 if moe is None else moe.num_experts_per_token / moe.num_experts
    found = 0.0
    for entry in expected_entries(config):
        routed = entry.expert_idx is not None
        found += entry_size(entry) * (share if routed else 1.0)
    return round(found)


def _reading_speed(checkpoint: Path, dtype: torch.dtype, *, device: str) -> float:
    """Read the first part of the largest tensor, as a layer is loaded; return bytes per second."""
    index = open_index(checkpoint)
    largest = max(index.tensors.values(), key=lambda spec: spec.nbytes)
    started, done = time.perf_counter(), 0
    with CheckpointReader(index) as reader:
        for chunk in reader.chunks(largest.name):
            read = torch.frombuffer(chunk, dtype=torch.uint8)
            torch.empty_like(read, device=device).copy_(read)  # as every weight is copied
            done += len(chunk)
            if done >= _PROBE_BYTES:
                break
    widening = max(1.0, dtype.itemsize / 2)
    return done / max(time.perf_counter() - started, 1e-9) / widening


def _multiplying_speed(config: ModelConfig, dtype: torch.dtype, *, device: str) -> float:
    """Multiply by a matrix of the model's width for a moment; return operations per second."""
    width = config.hidden_size
    x = torch.zeros(64, width, dtype=dtype, device=device)
    weight = torch.zeros(width, width, dtype=dtype, device=device)
    on_gpu = torch.device(device).type == "cuda"
    finished = torch.cuda.synchronize if on_gpu else _already
    torch.mm(x, weight)  # the first call loads a library
    finished()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < _PROBE_SECONDS:
        torch.mm(x, weight)
        count += 1
    finished()
    return 2 * 64 * width * width * count / (time.perf_counter() - started)


def _already() -> None:
    """Wait for nothing: a CPU is done when a call returns."""
