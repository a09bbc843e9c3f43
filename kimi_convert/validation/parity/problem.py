"""What every implementation is given, and what it must offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.progress import ProgressCallback
from kimi_convert.model.numerics import Numerics
from kimi_convert.validation.parity.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What every runner is given."""

    folder: Path
    config: ModelConfig
    tokens: torch.Tensor  # [B, T] int64
    prompt: tuple[int, ...]
    new_tokens: int  # of the greedy continuation; 0 for none
    follow: Callable[[Numerics], Trace]  # the reference under given numerics
    on_progress: ProgressCallback


class Runner(Protocol):
    """Runs a model in one way, or in a few that share a process."""

    @property
    def name(self) -> str:
        """What `--against` calls it."""
        ...

    @property
    def what(self) -> str:
        """A line for people."""
        ...

    @property
    def numerics(self) -> Numerics:
        """Its choices where implementations disagree."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of activations, and of weights that were rounded."""
        ...

    def why_not(self, problem: Problem) -> str:
        """Return what keeps it from running here; empty if nothing does."""
        ...

    def run(self, problem: Problem) -> Iterator[tuple[str, Trace]]:
        """Yield the name of a row, and its trace."""
        ...
