"""The reference: our model in plain torch and fp32, once for every choice of numerics that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.progress import ProgressCallback
from kimi_convert.model.numerics import SERVED, Numerics
from kimi_convert.validation.parity.numerics_of import effective
from kimi_convert.validation.parity.pairs import Row, kept_row
from kimi_convert.validation.parity.torch_model import (
    TorchRun,
    continue_greedily,
    trace_checkpoint,
)
from kimi_convert.validation.parity.trace import Greedy, Trace

REFERENCE = "torch"


@dataclass(slots=True)
class References:
    """The reference under every choice of numerics that some implementation makes."""

    checkpoint: Path
    config: ModelConfig
    tokens: torch.Tensor
    new_tokens: int  # of a continuation
    on_progress: ProgressCallback
    traces: dict[Numerics, Trace] = field(default_factory=dict)
    continuations: dict[Numerics, Greedy] = field(default_factory=dict)

    def trace(self, numerics: Numerics) -> Trace:
        """Run the reference as an implementation with these numerics must."""
        chosen = self._effective(numerics)
        if chosen not in self.traces:
            self.traces[chosen] = trace_checkpoint(
                self.checkpoint,
                self.tokens,
                TorchRun(numerics=chosen),
                label="reference",
                on_progress=self.on_progress,
            )
        return self.traces[chosen]

    def greedy(self, numerics: Numerics, prompt: Sequence[int]) -> Greedy:
        """Continue the prompt with these numerics."""
        chosen = self._effective(numerics)
        if chosen not in self.continuations:
            self.continuations[chosen] = continue_greedily(
                self.checkpoint, prompt, self.new_tokens, TorchRun(numerics=chosen)
            )
        return self.continuations[chosen]

    def row(self) -> Row:
        """Return the reference's own logits, as it is served."""
        return kept_row(
            REFERENCE,
            self.trace(SERVED),
            self.trace(SERVED),
            numerics=SERVED,
            dtype=torch.float32,
            config=self.config,
        )

    def _effective(self, numerics: Numerics) -> Numerics:
        return effective(numerics, self.config, torch.float32)
