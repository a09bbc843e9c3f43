"""How long work tells its caller how far it is: one event type, one callback type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One step forward: `done` of `total` units of a stage; `total` is known from the start."""

    stage: str  # a short phrase for people: "writing shards"
    done: int
    total: int
    unit: str  # "bytes", "tokens", "tensors", "layers"; "%" where no count says anything
    detail: str = ""  # what is being worked on: a file, a tensor, a layer


ProgressCallback = Callable[[ProgressEvent], None]


def ignore_progress(event: ProgressEvent) -> None:
    """Take an event and do nothing: the default callback."""
