"""What a validation will take, said before it starts: memory from the config, time from a probe.

A model runs one layer at a time, so memory is one layer of each model and the activations that are
carried, whatever the depth; on a GPU that is its own memory. Time is what there is to read at the
speed of this disk, and what there is to multiply at the speed of this processor, both tried out on
a little of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.mapping import Entry, Storage
from kimi_convert.checkpoints.messages import sized
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import read_config
from kimi_convert.conversion.memory import PROCESS_BYTES, free_memory_bytes
from kimi_convert.errors import ResourceError
from kimi_convert.model.names.layout import expected_entries
from kimi_convert.validation.options import Check, ValidationOptions

_CONSISTENCY_SEQUENCES = 2
_FORMS = 4  # one prefill, and three others held against it
_LOGITS_BYTES = 5 * 32 * 1024 * 1024  # as `scores` bounds them
_PROBE_BYTES = 64 * 1024 * 1024
_PROBE_SECONDS = 0.02
_WIDTHS_IN_A_LAYER = 12  # arrays as wide as a mixer's heads or a dense feed-forward, at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Before the first layer is loaded."""

    device: str  # that the layers run on
    layer_bytes: int  # the largest layer of each model, in the dtype that it runs in
    activation_bytes: int  # carried from layer to layer, and made inside one
    read_bytes: int  # from files, all passes together
    passes: int
    bytes_per_second: float  # measured here, on this checkpoint
    operations: int  # multiplications and additions
    operations_per_second: float  # measured here

    @property
    def memory_bytes(self) -> int:
        """On the device: one layer and activations, and on a CPU the program."""
        return self.fixed_bytes + self.activation_bytes

    @property
    def fixed_bytes(self) -> int:
        """The same without activations."""
        return self.layer_bytes + (0 if _is_cuda(self.device) else PROCESS_BYTES)

    @property
    def seconds(self) -> float:
        """Reading and multiplying, one after the other."""
        reading = self.read_bytes / self.bytes_per_second
        return reading + self.operations / self.operations_per_second


def estimate_validation(
    checkpoint: Path,
    *,
    teacher: Path | None = None,
    has_text: bool = False,
    options: ValidationOptions,
) -> Estimate:
    """Look at configs and headers, and try the disk and the processor for a moment.

    Args:
        checkpoint: the folder.
        teacher: the checkpoint that it was made from, if it is compared.
        has_text: whether quality is measured.
        options: of the validation.

    Raises:
        ConfigError: a config.json is missing or not valid.
        CheckpointError: a folder is not a readable checkpoint.
    """
    dtype = options.torch_dtype
    configs = [read_config(folder) for folder in (checkpoint, teacher) if folder is not None]
    config = configs[0]
    measured = has_text and Check.QUALITY in options.checks
    scanned = not options.checks.isdisjoint({Check.VALUES, Check.HASHES})
    compared = Check.CONSISTENCY in options.checks
    passes = int(scanned) + int(compared) + int(measured)
    index = open_index(checkpoint)
    read = passes * index.nbytes
    if measured and teacher is not None:
        read += open_index(teacher).nbytes
    streams = (len(configs) + (1 if len(configs) > 1 else 0)) if measured else 0
    tokens = _CONSISTENCY_SEQUENCES * options.consistency_tokens * _FORMS * int(compared)
    tokens += streams * options.max_tokens
    loaded = configs if measured else configs[:1]
    return Estimate(
        device=options.device,
        layer_bytes=sum(largest_part_bytes(one, dtype) for one in loaded),
        activation_bytes=_activation_bytes(config, options, streams=streams),
        read_bytes=read,
        passes=passes,
        bytes_per_second=_reading_speed(checkpoint, dtype, device=options.device),
        operations=2 * active_parameters(config) * tokens,
        operations_per_second=_multiplying_speed(config, dtype, device=options.device),
    )


def require_memory(estimate: Estimate, *, where: Path) -> None:
    """Check that the largest layer fits: nothing makes a layer smaller once it is being loaded.

    Raises:
        ResourceError: it does not.
    """
    needed, free = estimate.fixed_bytes, _free_bytes(estimate.device)
    if free is not None and free < needed:
        raise ResourceError(
            "not enough memory for one layer",
            where=where,
            expected=sized(needed),
            found=f"{sized(free)} free",
            hint="Use --dtype bfloat16, or leave out --teacher.",
        )


def too_large(configs: Iterable[ModelConfig], options: ValidationOptions) -> str | None:
    """Say why the larger of some models cannot be loaded as a whole here, or return None."""
    needed = max(
        sum(_size(entry) * _item_bytes(entry, options.torch_dtype) for entry in entries)
        for entries in map(expected_entries, configs)
    )
    device = torch.device(options.device)
    free = free_memory_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if free is None or PROCESS_BYTES + needed <= free:
        return None
    return f"a whole model takes {sized(needed)}, and {sized(free)} are free"


def largest_part_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the largest of embedding, layers and head, as they run."""
    parts: dict[object, int] = {}
    for entry in expected_entries(config):
        key = entry.param if entry.layer_idx is None else entry.layer_idx
        parts[key] = parts.get(key, 0) + _size(entry) * _item_bytes(entry, dtype)
    return max(parts.values())


def active_parameters(config: ModelConfig) -> int:
    """Return how many weights a token meets: of the routed experts, those that it chooses."""
    moe = config.moe
    share = 1.0 if moe is None else moe.num_experts_per_token / moe.num_experts
    found = 0.0
    for entry in expected_entries(config):
        routed = entry.expert_idx is not None
        found += _size(entry) * (share if routed else 1.0)
    return round(found)


def _size(entry: Entry) -> int:
    count = 1
    for length in entry.shape:
        count *= length
    return count


def _item_bytes(entry: Entry, dtype: torch.dtype) -> int:
    return 4 if entry.storage is Storage.FP32 else dtype.itemsize


def _activation_bytes(config: ModelConfig, options: ValidationOptions, *, streams: int) -> int:
    item = options.torch_dtype.itemsize
    carried = max(
        streams * options.max_tokens,
        _FORMS * _CONSISTENCY_SEQUENCES * options.consistency_tokens,
    )
    heads = config.mla.num_heads * config.mla.qk_head_dim
    widest = max(config.intermediate_size, config.hidden_size, heads)
    at_once = min(options.batch_rows * options.sequence_length, options.max_tokens)
    inside = at_once * widest * _WIDTHS_IN_A_LAYER * 4
    return carried * config.hidden_size * item + inside + (_LOGITS_BYTES if streams else 0)


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _free_bytes(device: str) -> int | None:
    """Return what may still be taken where the layers run, or None where that is not known."""
    return torch.cuda.mem_get_info(device)[0] if _is_cuda(device) else free_memory_bytes()


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
    finished = torch.cuda.synchronize if _is_cuda(device) else _already
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
