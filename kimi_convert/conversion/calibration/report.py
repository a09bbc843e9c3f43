"""What a calibration says of itself: per layer, per choice, and for the student as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kimi_convert.conversion.calibration.outcome import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFit:
    """One layer, counted from 0."""

    layer_idx: int
    mixer: str  # "kda" or "mla"
    kl_as_kda: float  # nats per token, with this layer alone converted
    kl_as_mla: float  # the same with this layer alone folded
    error: float  # of the mixer's output in the student's stream, validation tokens
    output: str  # which output matrix is used: "solved" unless it did harm
    search: Mapping[str, object] = field(repr=False)  # what the search noted
    solved: Mapping[str, object] = field(repr=False)  # what the second pass noted

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return {
            "layer": self.layer_idx,
            "mixer": self.mixer,
            "kl_as_kda": self.kl_as_kda,
            "kl_as_mla": self.kl_as_mla,
            "search": dict(self.search),
            "solved": dict(self.solved),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSet:
    """A set of layers that could stay MLA."""

    kept: tuple[int, ...]
    kl: float  # nats per token on validation tokens, before the second pass
    longest_run: int  # of KDA layers in a row


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """A finished calibration. Times are left out: the same inputs give the same report."""

    text_name: str
    text_sha256: str
    tokens: int
    sequence_length: int
    kept: tuple[int, ...]
    compared: tuple[KeptSet, ...]  # the released pattern first
    layers: tuple[LayerFit, ...]
    validation: Outcome
    distilled: Mapping[str, object] | None = None  # what the distillation noted

    def to_json(self) -> dict[str, object]:
        """Return the part of conversion.json."""
        return {
            "text": {"name": self.text_name, "sha256": self.text_sha256},
            "tokens": self.tokens,
            "sequence_length": self.sequence_length,
            "kept": list(self.kept),
            "compared": [
                {"kept": list(one.kept), "kl": one.kl, "longest_run_of_kda": one.longest_run}
                for one in self.compared
            ],
            "layers": [layer.to_json() for layer in self.layers],
            "validation": self.validation.to_json(),
            **({} if self.distilled is None else {"distilled": dict(self.distilled)}),
        }
