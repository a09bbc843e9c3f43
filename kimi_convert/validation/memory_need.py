"""How much memory a validation takes, from configs alone, and whether what it carries must go to disk.

A model runs one layer at a time, so memory is one layer of each model and the activations that are
carried, whatever the depth; on a GPU that is its own memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kimi_convert.checkpoints.disk import free_bytes
from kimi_convert.checkpoints.mapping import Entry, Storage
from kimi_convert.checkpoints.messages import sized
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.conversion.memory import PROCESS_BYTES, free_memory_bytes
from kimi_convert.errors import ResourceError
from kimi_convert.model.names.layout import expected_entries
from kimi_convert.validation.activations import scratch_folder
from kimi_convert.validation.options import Check, ValidationOptions
from kimi_convert.validation.replacement import TOKENS as REPLACED_TOKENS

CONSISTENCY_SEQUENCES = 2
FORMS = 4  # one prefill, and three others held against it
_PROBE_TOKENS = 8192  # of each model, as `probe_streams` bounds them
_LOGITS_BYTES = 5 * 32 * 1024 * 1024  # as `scores` bounds them
_WIDTHS_IN_A_LAYER = 12  # arrays as wide as a mixer's heads or a dense feed-forward, at once


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Where the layers run, and what for."""

    device: str
    layer_bytes: int  # the largest layer of each model, in the dtype that it runs in
    inside_bytes: int  # made inside one layer, logits, and small streams that stay in memory
    carried_bytes: int  # hidden states of the text, from layer to layer
    on_disk: bool  # whether these are kept in a file

    @property
    def fixed_bytes(self) -> int:
        """Layers, and on a CPU the program: what nothing makes smaller."""
        return self.layer_bytes + (0 if _is_cuda(self.device) else PROCESS_BYTES)

    @property
    def memory_bytes(self) -> int:
        """All of it that is in memory."""
        return self.fixed_bytes + self.inside_bytes + (0 if self.on_disk else self.carried_bytes)

    @property
    def disk_bytes(self) -> int:
        """What is kept in files meanwhile."""
        return self.carried_bytes if self.on_disk else 0


def memory_need(
    configs: Sequence[ModelConfig], options: ValidationOptions, *, text_tokens: int
) -> MemoryNeed:
    """Add up what a validation holds.

    Args:
        configs: of the checkpoint and, if it has one, of its teacher.
        options: of the validation.
        text_tokens: that quality is measured on; 0 where it is not.
    """
    measured = text_tokens > 0 and Check.QUALITY in options.checks
    loaded = configs if measured else configs[:1]
    config, item = configs[0], options.torch_dtype.itemsize
    carried = num_streams(configs) * text_tokens * config.hidden_size * item
    need = MemoryNeed(
        device=options.device,
        layer_bytes=sum(largest_part_bytes(one, options.torch_dtype) for one in loaded),
        inside_bytes=_inside_bytes(config, options, models=len(loaded) * int(measured)),
        carried_bytes=carried if measured else 0,
        on_disk=False,
    )
    free = _free_bytes(options.device)
    fits = free is None or need.memory_bytes <= free
    return replace(need, on_disk=need.carried_bytes > 0 and not fits)


def num_streams(configs: Sequence[ModelConfig]) -> int:
    """Return how often a text is run: also by the teacher, and without the converted mixers."""
    return 1 if len(configs) == 1 else 3


def require_room(need: MemoryNeed, *, where: Path) -> None:
    """Check that the largest layer fits, and on the disk what does not fit into memory beside it.

    Raises:
        ResourceError: it does not.
    """
    free = _free_bytes(need.device)
    if free is not None and free < need.fixed_bytes:
        raise ResourceError(
            "not enough memory for one layer",
            where=where,
            expected=sized(need.fixed_bytes),
            found=f"{sized(free)} free",
            hint="Use --dtype bfloat16, or leave out --teacher.",
        )
    room = free_bytes(scratch_folder())
    if room is not None and room < need.disk_bytes:
        raise ResourceError(
            "not enough memory for the activations, nor room on the disk",
            where=scratch_folder(),
            expected=sized(need.disk_bytes),
            found=f"{sized(room)} free",
            hint="Set TMPDIR to a folder with more room, or measure on fewer --max-tokens.",
        )


def too_large(configs: Iterable[ModelConfig], options: ValidationOptions) -> str | None:
    """Say why the larger of some models cannot be loaded as a whole here, or return None."""
    needed = max(
        sum(entry_size(entry) * _item_bytes(entry, options.torch_dtype) for entry in entries)
        for entries in map(expected_entries, configs)
    )
    free = _free_bytes(options.device)
    if free is None or PROCESS_BYTES + needed <= free:
        return None
    return f"a whole model takes {sized(needed)}, and {sized(free)} are free"


def largest_part_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the largest of embedding, layers and head, as they run."""
    parts: dict[object, int] = {}
    for entry in expected_entries(config):
        key = entry.param if entry.layer_idx is None else entry.layer_idx
        parts[key] = parts.get(key, 0) + entry_size(entry) * _item_bytes(entry, dtype)
    return max(parts.values())


def entry_size(entry: Entry) -> int:
    """Return how many numbers a tensor has."""
    return math.prod(entry.shape)


def _item_bytes(entry: Entry, dtype: torch.dtype) -> int:
    return 4 if entry.storage is Storage.FP32 else dtype.itemsize


def _inside_bytes(config: ModelConfig, options: ValidationOptions, *, models: int) -> int:
    item = options.torch_dtype.itemsize
    heads = config.mla.num_heads * config.mla.qk_head_dim
    widest = max(config.intermediate_size, config.hidden_size, heads)
    at_once = min(options.batch_rows * options.sequence_length, options.max_tokens)
    tokens = FORMS * CONSISTENCY_SEQUENCES * options.consistency_tokens
    if models:
        tokens = max(tokens, models * _PROBE_TOKENS * int(Check.PROBES in options.checks))
    if models > 1 and Check.REPLACEMENT in options.checks:
        tokens += config.num_layers * min(REPLACED_TOKENS, options.max_tokens)
    inside = at_once * widest * _WIDTHS_IN_A_LAYER * 4
    return tokens * config.hidden_size * item + inside + (_LOGITS_BYTES if models else 0)


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _free_bytes(device: str) -> int | None:
    """Return what may still be taken where the layers run, or None where that is not known."""
    return torch.cuda.mem_get_info(device)[0] if _is_cuda(device) else free_memory_bytes()
