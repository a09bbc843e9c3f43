"""Every implementation against every other, on the logits that were kept of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.model.numerics import Numerics
from kimi_convert.validation.bounds import coarsest, error_bound
from kimi_convert.validation.parity.compare import comparable_tokens
from kimi_convert.validation.parity.logits import relative_error
from kimi_convert.validation.parity.numerics_of import differing, effective
from kimi_convert.validation.parity.report import PairError
from kimi_convert.validation.parity.routing import groups_of
from kimi_convert.validation.parity.trace import Trace

_KEPT_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """Logits of one implementation, of all tokens or of evenly spaced ones."""

    name: str
    numerics: Numerics  # effective
    dtype: torch.dtype
    places: torch.Tensor  # [N], which tokens of all sequences
    logits: torch.Tensor  # [N, vocab]


def kept_row(
    name: str,
    trace: Trace,
    expected: Trace,
    *,
    numerics: Numerics,
    dtype: torch.dtype,
    config: ModelConfig,
) -> Row:
    """Keep of a trace what pairs are compared on, about 32 MB at most.

    Args:
        name: of the row.
        trace: of the implementation.
        expected: of the reference with the same numerics.
        numerics: of the implementation.
        dtype: the coarsest of activations, and of weights that were rounded.
        config: of the model.
    """
    sequences, tokens = trace.logits.shape[:2]
    whole = expected.logits.shape[1]
    part = expected.leading(sequences, tokens)
    # Behind a near tie between experts a token says nothing.
    kept = comparable_tokens(trace, part, groups=groups_of(config))[:, -1]  # [B, T]
    numbers = torch.arange(len(expected.logits) * whole).reshape(-1, whole)
    step = max(1, -(-expected.logits.nbytes // _KEPT_BYTES))
    kept &= numbers[:sequences, :tokens] % step == 0
    chosen = effective(numerics, config, dtype)
    places = numbers[:sequences, :tokens][kept]
    return Row(name, chosen, dtype, places, trace.logits[kept].clone())


def compare_pairs(rows: Sequence[Row], config: ModelConfig) -> list[PairError]:
    """Compare each row with those after it; judged where both make the same choices."""
    found: list[PairError] = []
    for place, first in enumerate(rows):
        for second in rows[place + 1 :]:
            mine = torch.isin(first.places, second.places)
            theirs = torch.isin(second.places, first.places)
            dtype = coarsest((first.dtype, second.dtype))
            differs = differing(first.numerics, second.numerics)
            found.append(
                PairError(
                    first=first.name,
                    second=second.name,
                    relative_error=relative_error(second.logits[theirs], first.logits[mine]),
                    bound=None if differs else error_bound(dtype, config.num_layers),
                    differs_in=differs,
                )
            )
    return found
