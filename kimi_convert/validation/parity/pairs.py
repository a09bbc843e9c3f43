"""Every implementation against every other, on the logits that were kept of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.model.numerics import Numerics
from kimi_convert.validation.bounds import coarsest, error_bound
from kimi_convert.validation.parity.compare import comparable_tokens, relative_error
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
    logits: torch.Tensor  # [N, vocab]
    kept: torch.Tensor  # [N] bool, False behind a near tie between experts


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
    logits = trace.logits.flatten(0, 1)
    step = max(1, -(-logits.nbytes // _KEPT_BYTES))
    kept = comparable_tokens(trace, expected, groups=groups_of(config))[:, -1].flatten()
    chosen = effective(numerics, config, dtype)
    return Row(name, chosen, dtype, logits[::step].clone(), kept[::step])


def compare_pairs(rows: Sequence[Row], config: ModelConfig) -> list[PairError]:
    """Compare each row with those after it; judged where both make the same choices."""
    found: list[PairError] = []
    for place, first in enumerate(rows):
        for second in rows[place + 1 :]:
            both = first.kept & second.kept
            dtype = coarsest((first.dtype, second.dtype))
            differs = differing(first.numerics, second.numerics)
            found.append(
                PairError(
                    first=first.name,
                    second=second.name,
                    relative_error=relative_error(second.logits[both], first.logits[both]),
                    bound=None if differs else error_bound(dtype, config.num_layers),
                    differs_in=differs,
                )
            )
    return found
