"""What one implementation computed on given tokens, and how it travels between processes.

A file holds tensors alone: their names are probes, so nothing in it can do anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kimi_convert.validation.parity.stages import LOGITS_PROBE, STATE, Probe

_DTYPE = "dtype"
_GREEDY_IDS, _GREEDY_LOGITS = "greedy ids", "greedy logits"


@dataclass(frozen=True, slots=True)
class Greedy:
    """A prompt continued by the likeliest token, again and again."""

    ids: torch.Tensor  # [N] int64, the prompt left out
    logits: torch.Tensor  # [N, vocab], what each id was chosen from


@dataclass(frozen=True, slots=True)
class Trace:
    """Values at every probe that an implementation reports, on the CPU."""

    values: Mapping[Probe, torch.Tensor]
    greedy: Greedy | None = None
    dtype: torch.dtype | None = None  # the coarsest, where only who ran it can tell
    rerouted: int = 0  # tokens and layers where a near tie between experts was followed

    @property
    def logits(self) -> torch.Tensor:
        """[B, T, vocab]."""
        return self.values[LOGITS_PROBE]

    def leading(self, sequences: int, tokens: int) -> Trace:
        """Return the values of the first tokens of the first sequences; no token sees a later one.

        States are of the last token, so they go where tokens do.
        """
        batch_size, num_tokens = self.logits.shape[:2]
        if (sequences, tokens) == (batch_size, num_tokens):
            return self
        kept = {
            probe: values[:sequences] if probe.stage == STATE else values[:sequences, :tokens]
            for probe, values in self.values.items()
            if probe.stage != STATE or tokens == num_tokens
        }
        return Trace(kept, self.greedy, self.dtype, self.rerouted)


def save_trace(trace: Trace, path: Path) -> None:
    """Write values and continuation to a file."""
    tensors = {
        f"{probe.layer_idx} {probe.stage}": values.contiguous()
        for probe, values in trace.values.items()
    }
    if trace.greedy is not None:
        tensors[_GREEDY_IDS] = trace.greedy.ids
        tensors[_GREEDY_LOGITS] = trace.greedy.logits.contiguous()
    # Copies: two probes may share memory, which the format refuses.
    metadata = {} if trace.dtype is None else {_DTYPE: str(trace.dtype).removeprefix("torch.")}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)


def load_trace(path: Path) -> Trace:
    """Read what `save_trace` wrote."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        dtype = (file.metadata() or {}).get(_DTYPE)
    ids, logits = tensors.pop(_GREEDY_IDS, None), tensors.pop(_GREEDY_LOGITS, None)
    greedy = None if ids is None or logits is None else Greedy(ids, logits)
    values: dict[Probe, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer_idx, _, stage = name.partition(" ")
        values[Probe(int(layer_idx), stage)] = tensor
    return Trace(values, greedy, None if dtype is None else getattr(torch, dtype))
