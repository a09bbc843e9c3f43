"""What a calibration says of itself: per layer, per choice, and for the student as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from kimi_convert.conversion.calibration.long_context import LongContext
from kimi_convert.conversion.calibration.outcome import Outcome
from kimi_convert.model.recall import ProbeResult

_FIRST_BASIS = "copied"  # what a search starts from


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFit:
    """One layer, counted from 0."""

    layer_idx: int
    mixer: str  # "kda" or "mla"
    kl_as_kda: float  # nats per token, with this layer alone converted
    kl_as_mla: float  # the same with this layer alone folded
    error: float  # of the mixer's output in the student's stream, validation tokens
    cosine: float  # of the angle between it and its target there
    norm_ratio: float  # its length over the target's
    stream_error: float  # what is left in the stream after it, over the teacher's stream
    router_agreement: float | None  # share of experts in common with the teacher; None where dense
    head_errors: tuple[float, ...]  # of the teacher's heads, each read from the same head alone
    half_life: float | None  # tokens; the median over heads of their medians, None where MLA
    beta: float | None  # the mean over heads
    eps_share: float | None  # of outputs below the eps of their norm, the mean over heads
    bases: Mapping[str, int]  # that the search chose for q and k -> in how many heads
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
            "error": self.error,
            "cosine": self.cosine,
            "norm_ratio": self.norm_ratio,
            "stream_error": self.stream_error,
            "router_agreement": self.router_agreement,
            "half_life": self.half_life,
            "beta": self.beta,
            "eps_share": self.eps_share,
            "bases": dict(self.bases),
            "search": dict(self.search),
            "solved": dict(self.solved),
        }


def layer_fit(
    layer_idx: int,
    *,
    kl_as_kda: float,
    kl_as_mla: float,
    router_agreement: float | None,
    search: Mapping[str, Any],
    solved: Mapping[str, Any],
) -> LayerFit:
    """Return a layer's report of what both passes noted; their values are what JSON gave."""
    choices: list[dict[str, str]] = search.get("choices", [])
    half_lives: list[list[float]] = solved.get("half_lives", [])
    beta: list[float] = solved.get("beta", [])
    eps_share: list[float] = solved.get("eps_share", [])
    return LayerFit(
        layer_idx=layer_idx,
        mixer=solved["mixer"],
        kl_as_kda=kl_as_kda,
        kl_as_mla=kl_as_mla,
        error=solved["error"],
        cosine=solved["cosine"],
        norm_ratio=solved["norm_ratio"],
        stream_error=solved["stream_error"],
        router_agreement=router_agreement,
        head_errors=tuple(head["error"] for head in solved["heads"]),
        half_life=median(head[1] for head in half_lives) if half_lives else None,
        beta=fmean(beta) if beta else None,
        eps_share=fmean(eps_share) if eps_share else None,
        bases=dict(Counter(head.get("basis", _FIRST_BASIS) for head in choices).most_common()),
        output=solved["output"],
        search=search,
        solved=solved,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSet:
    """A set of layers that could stay MLA."""

    kept: tuple[int, ...]
    kl: float  # nats per token on validation tokens, before the second pass
    chance: float  # nats that it could be behind the lowest by chance: two standard errors
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
    long_context: LongContext | None = None  # where another set than the released is chosen
    distilled: Mapping[str, object] | None = None  # what the distillation noted
    probes: Sequence[ProbeResult] = ()

    def to_json(self) -> dict[str, object]:
        """Return the part of conversion.json."""
        return {
            "text": {"name": self.text_name, "sha256": self.text_sha256},
            "tokens": self.tokens,
            "sequence_length": self.sequence_length,
            "kept": list(self.kept),
            "compared": [
                {
                    "kept": list(one.kept),
                    "kl": one.kl,
                    "chance": one.chance,
                    "longest_run_of_kda": one.longest_run,
                }
                for one in self.compared
            ],
            "long_context": None if self.long_context is None else self.long_context.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "validation": self.validation.to_json(),
            "probes": [probe.to_json() for probe in self.probes],
            **({} if self.distilled is None else {"distilled": dict(self.distilled)}),
        }
