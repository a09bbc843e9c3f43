"""Hold one trace against another: how far apart they are, whether that is rounding, where it starts.

The verdict rests on logits, hidden states, states and the scores that experts are chosen by. Which stage is the first that differs is
looked up only where the verdict is bad: sums inside a layer cancel and may well be further apart
than what leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.validation.bounds import (
    cosine_bound,
    error_bound,
    kl_bound,
    stage_bound,
)
from kimi_convert.validation.parity.logits import (
    LogitsComparison,
    compare_logits,
    relative_error,
)
from kimi_convert.validation.parity.routing import explained_choices, groups_of
from kimi_convert.validation.parity.stages import (
    EMBED,
    HIDDEN,
    LATENTS,
    LOGITS,
    ROUTER,
    SCORES,
    STATE,
    Probe,
    in_order,
)
from kimi_convert.validation.parity.trace import Trace

# Scores too: where they are right, a choice that differs can only be a tie.
_JUDGED = (EMBED, SCORES, HIDDEN, STATE, LATENTS, LOGITS)
_WITHOUT_TOKENS = (STATE,)  # the others have one row per token


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """The first place where two traces part."""

    layer_idx: int | None  # None: before the first layer, or after the last
    stage: str
    name: str  # layer and stage
    made_of: str
    error: float
    bound: float  # on errors up to there
    first_token: int | None  # the first position that differs, over all sequences
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One trace against the reference."""

    bound: float
    logits: LogitsComparison
    hidden: Mapping[int, float]  # error of the hidden state after each layer
    states: Mapping[int, float]  # of what each layer keeps after the last token
    left_out: int  # tokens behind a near tie between experts, which say nothing
    failures: tuple[str, ...]  # what is above its bound
    location: Location | None

    @property
    def passed(self) -> bool:
        """Whether all differences are rounding."""
        return not self.failures


def compare_traces(
    found: Trace, expected: Trace, *, dtype: torch.dtype, config: ModelConfig
) -> Comparison:
    """Compare what both report.

    Args:
        found: of the implementation that is judged, of all tokens or of the first ones.
        expected: of the reference.
        dtype: the coarsest that weights or activations of either have.
        config: of the model.
    """
    bound = error_bound(dtype, config.num_layers)
    expected = expected.leading(*found.logits.shape[:2])
    kept = comparable_tokens(found, expected, groups=groups_of(config))
    errors: dict[Probe, float] = {}
    for probe in in_order(found.values.keys() & expected.values.keys()):
        if probe.stage in _JUDGED:
            errors[probe] = _error(found, expected, probe, kept)
    logits = compare_logits(found.logits, expected.logits, kept=kept[:, -1], bound=bound)
    failures = [probe.name for probe, error in errors.items() if not error <= bound]
    failures += _logits_failures(logits, expected.logits, bound)
    return Comparison(
        bound=bound,
        logits=logits,
        hidden={p.layer_idx: error for p, error in errors.items() if p.stage == HIDDEN},
        states={p.layer_idx: e for p, e in errors.items() if p.stage in (STATE, LATENTS)},
        left_out=int((~kept[:, -1]).sum()),
        failures=tuple(failures),
        location=locate(found, expected, dtype=dtype, kept=kept) if failures else None,
    )


def locate(
    found: Trace, expected: Trace, *, dtype: torch.dtype, kept: torch.Tensor
) -> Location | None:
    """Return the first stage, as a model runs, whose error is above the bound of its depth.

    Args:
        found: of the implementation that is judged.
        expected: of the reference.
        dtype: as in `compare_traces`.
        kept: [B, L, T], which tokens to compare.
    """
    for probe in in_order(found.values.keys() & expected.values.keys()):
        error = _error(found, expected, probe, kept)
        bound = stage_bound(dtype, min(probe.layer_idx, kept.shape[1] - 1))
        if not error <= bound:
            return _location(found, expected, probe, error, bound)
    return None


def _location(found: Trace, expected: Trace, probe: Probe, error: float, bound: float) -> Location:
    mine, theirs = found.values[probe], expected.values[probe]
    note = ""
    first_token = None
    if mine.shape != theirs.shape:
        note = f"shape {list(mine.shape)} instead of {list(theirs.shape)}"
    elif probe.stage in _WITHOUT_TOKENS:
        if relative_error(mine.transpose(-1, -2), theirs) <= bound:
            note = "equal once its last two axes, K and V, are exchanged"
    else:
        first_token = _first_token(mine, theirs, bound)
    inside = EMBED != probe.stage != LOGITS
    return Location(
        layer_idx=probe.layer_idx if inside else None,
        stage=probe.stage,
        name=probe.name,
        made_of=probe.made_of,
        error=error,
        bound=bound,
        first_token=first_token,
        note=note or _permutation_note(mine, theirs, bound),
    )


def _first_token(found: torch.Tensor, expected: torch.Tensor, bound: float) -> int:
    apart = (found.double() - expected.double()).abs().flatten(2).amax(-1)  # [B, T]
    wrong = ~(apart <= bound * expected.double().abs().max())
    return int(wrong.any(0).int().argmax())


def _permutation_note(found: torch.Tensor, expected: torch.Tensor, bound: float) -> str:
    """Say so if the same values stand at other places of the last axis, as permuted heads do."""
    if found.shape != expected.shape:
        return ""
    mine, theirs = (t.double().flatten(0, -2).T for t in (found, expected))  # [X, N]
    apart = torch.cdist(theirs, mine, p=float("inf")) if len(mine) <= _MAX_CHANNELS else None
    if apart is None or not apart.isfinite().all():
        return ""
    nearest = apart.min(-1)
    same = bool((nearest.values <= bound * theirs.abs().max()).all())
    moved = nearest.indices != torch.arange(len(theirs))
    if not same or not moved.any():
        return ""
    first = int(moved.int().argmax())
    return (
        f"the same values in another order: channel {int(nearest.indices[first])} stands where "
        f"{first} belongs, {int(moved.sum())} of {len(theirs)} moved"
    )


# The search compares every channel with every other.
_MAX_CHANNELS = 2048


def _error(found: Trace, expected: Trace, probe: Probe, kept: torch.Tensor) -> float:
    mine, theirs = found.values[probe], expected.values[probe]
    if mine.shape != theirs.shape:
        return math.inf
    if probe.stage in _WITHOUT_TOKENS:
        rows = kept[:, min(probe.layer_idx, kept.shape[1] - 1)].all(-1)
        return relative_error(mine[rows], theirs[rows])
    at = kept[:, max(0, min(probe.layer_idx, kept.shape[1] - 1))]  # [B, T]
    return relative_error(mine[at], theirs[at])


def comparable_tokens(found: Trace, expected: Trace, *, groups: int) -> torch.Tensor:
    """Return [B, L, T]: whether a token can be compared from a layer on.

    Not after a near tie between experts in that token, or in one that it can see.
    """
    layers = [probe.layer_idx for probe in expected.values if probe.stage == HIDDEN]
    batch_size, num_tokens = expected.logits.shape[:2]
    kept = torch.ones(batch_size, max(layers, default=0) + 1, num_tokens, dtype=torch.bool)
    for layer_idx in sorted(layers):
        tied = _tied(found, expected, layer_idx, groups=groups)
        if tied is not None:
            kept[:, layer_idx:] &= (tied.cumsum(-1) == 0)[:, None]
    return kept


def _tied(found: Trace, expected: Trace, layer_idx: int, *, groups: int) -> torch.Tensor | None:
    scores, weights = Probe(layer_idx, SCORES), Probe(layer_idx, ROUTER)
    both = found.values.keys() & expected.values.keys()
    if not {scores, weights} <= both:
        return None
    return explained_choices(
        found.values[scores].double(),
        found.values[weights],
        expected_scores=expected.values[scores].double(),
        expected_weights=expected.values[weights],
        groups=groups,
    )


def _logits_failures(
    logits: LogitsComparison, expected: torch.Tensor, bound: float
) -> Sequence[str]:
    largest = expected.double().abs().max().item()
    checks = {
        "cosine of logits": logits.one_minus_cosine <= cosine_bound(bound),
        "KL of logits": logits.kl <= kl_bound(bound, largest),
        "largest logit": logits.disagreements == logits.near_ties,
    }
    return [name for name, holds in checks.items() if not holds]
