"""What a comparison of implementations found, as data: every number beside its bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from kimi_convert.validation.parity.compare import Comparison
from kimi_convert.validation.parity.spectrum import DecaySpectrum
from kimi_convert.validation.report import Environment, plain

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyComparison:
    """A greedy continuation against the reference's."""

    tokens: int
    equal: int  # leading tokens that are equal
    gap: float | None  # between the two logits, in the reference, where they part
    margin: float | None  # a gap up to this is a near tie
    passed: bool  # all are equal, or they part at a near tie


@dataclass(frozen=True, slots=True, kw_only=True)
class ImplementationResult:
    """One implementation against the reference that makes the same choices."""

    name: str
    what: str
    dtype: str  # the coarsest of activations and of weights that were rounded
    numerics: Mapping[str, str]  # choices that differ from how the model is served
    comparison: Comparison
    rerouted: int  # pairs of token and layer with a near tie between experts, followed
    greedy: GreedyComparison | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every difference is rounding."""
        return self.comparison.passed and (self.greedy is None or self.greedy.passed)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairError:
    """Logits of two implementations."""

    first: str
    second: str
    relative_error: float
    bound: float | None  # None: they make other choices, so they need not agree
    differs_in: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether they agree, where they must."""
        return self.bound is None or self.relative_error <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """An implementation that did not run."""

    name: str
    why: str
    failed: bool  # it should have


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """All of it."""

    checkpoint: str
    model_type: str
    num_layers: int
    kda_layers: tuple[int, ...]
    tokens: str  # "text" or "random"
    sequences: int
    sequence_length: int
    reference: str
    implementations: tuple[ImplementationResult, ...]
    pairs: tuple[PairError, ...]
    absent: tuple[Absent, ...]
    decay: tuple[DecaySpectrum, ...]  # of the reference
    environment: Environment

    @property
    def passed(self) -> bool:
        """Whether all implementations that must agree do, and none failed to run."""
        return (
            all(one.passed for one in self.implementations)
            and all(pair.passed for pair in self.pairs)
            and not any(one.failed for one in self.absent)
        )

    def to_json(self) -> dict[str, object]:
        """Return the document that `parity --json` prints."""
        body = cast("dict[str, object]", plain(self))
        return {"format": FORMAT, "passed": self.passed, **body}
