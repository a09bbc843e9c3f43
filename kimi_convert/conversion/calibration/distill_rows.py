"""The rows of tokens that each step of a distillation draws.

A text that is shorter than the training is met several times. Every pass cuts it at other places and
takes the pieces in another order, so that no context is met twice. Text alone seldom asks a model to
copy, which attention does well and a state of fixed size does not: a share of rows repeats a piece
of itself, half of them with its tokens shuffled, so that nothing but the context tells what follows.
"""

from __future__ import annotations

import torch

_REPEATED_SHARE = 1 / 8  # of the rows of a step
_SHORTEST_SPAN = 8
_EPOCH_SEED = 1_000_003


class StepRows:
    """Rows by step: those of a step do not depend on which steps ran before in this process."""

    def __init__(self, tokens: torch.Tensor, *, rows_per_step: int, seed: int) -> None:
        """Prepare.

        Args:
            tokens: [L, T], pieces of a text in its order.
            rows_per_step: at most L.
            seed: of the order, the cuts and the repetitions.
        """
        self._flat = tokens.flatten()
        self._rows, self._length = tokens.shape
        self.rows_per_step = max(1, min(rows_per_step, self._rows - 1))
        self._seed = seed

    def of(self, step: int) -> torch.Tensor:
        """Return the rows [rows_per_step, T] of a step, counted from 0."""
        size = self.rows_per_step
        per_epoch = max(1, (self._rows - 1) // size)
        epoch, at = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(_EPOCH_SEED * self._seed + epoch)
        cut = int(torch.randint(self._length, (1,), generator=generator))
        order = torch.randperm(self._rows - 1, generator=generator)[size * at : size * (at + 1)]
        first = cut + self._length * order
        rows = self._flat[first[:, None] + torch.arange(self._length)]
        draws = torch.Generator().manual_seed(_EPOCH_SEED * (self._seed + 1) + step)
        return self._with_repetitions(rows, draws)

    def _with_repetitions(self, rows: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        """Repeat the first tokens of some rows until they are full."""
        share = torch.rand(len(rows), 1, generator=draws)
        longest = max(self._length // 2, _SHORTEST_SPAN)
        spans = torch.randint(_SHORTEST_SPAN, longest + 1, (len(rows), 1), generator=draws)
        order = torch.rand(rows.shape, generator=draws).argsort(1)
        shuffled = torch.where(share < _REPEATED_SHARE / 2, rows.gather(1, order), rows)
        at = torch.arange(self._length) % spans.clamp_max(self._length)
        return torch.where(share < _REPEATED_SHARE, shuffled.gather(1, at), rows)
