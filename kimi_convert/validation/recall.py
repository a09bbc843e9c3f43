"""Probes of what a model can look up in its context: copying, induction, recall of pairs.

Each draws random tokens, so that nothing but the context can tell the answer. Accuracy is the
share of answers that are the most likely next token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeTokens:
    """Sequences, and where in them the next token can be told."""

    tokens: torch.Tensor  # [N, T + 1]
    asked: torch.Tensor  # [N, T] bool: whether the token after this one is an answer

    @property
    def inputs(self) -> torch.Tensor:
        """What a model is given, [N, T]."""
        return self.tokens[:, :-1]

    @property
    def answers(self) -> torch.Tensor:
        """The tokens that are asked for, [n], in the order of `asked`."""
        return self.tokens[:, 1:][self.asked]


def copying_probe(
    token_ids: torch.Tensor,
    *,
    span: int,
    rows: int,
    seed: int,
    between: torch.Tensor | None = None,
) -> ProbeTokens:
    """Repeat a random span: every token of the second copy but its first can be told.

    Args:
        token_ids: [n], what is drawn from; at least `span` of them, none is drawn twice in a span.
        span: tokens.
        rows: sequences.
        seed: of the draws.
        between: [rows, n], what stands between the two; None for nothing.
    """
    drawn = _drawn(token_ids, span, rows, seed)
    between = drawn[:, :0] if between is None else between
    tokens = torch.cat((drawn, between, drawn), 1)
    asked = torch.zeros(rows, tokens.shape[1] - 1, dtype=torch.bool)
    asked[:, 1 - span :] = True
    return ProbeTokens(tokens=tokens, asked=asked)


def induction_probe(token_ids: torch.Tensor, *, length: int, rows: int, seed: int) -> ProbeTokens:
    """End on a token that has come before: what followed it then is the answer.

    Args:
        token_ids: [n], what is drawn from; at least `length` of them.
        length: tokens before the last one; each differs.
        rows: sequences.
        seed: of the draws, and of which token comes again.
    """
    drawn = _drawn(token_ids, length, rows, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    # Not the last two, so that the answer is neither the token itself nor next to it.
    at = torch.randint(length - 2, (rows, 1), generator=generator)
    tokens = torch.cat((drawn, drawn.gather(1, at), drawn.gather(1, at + 1)), 1)
    asked = torch.zeros(rows, length + 1, dtype=torch.bool)
    asked[:, -1] = True
    return ProbeTokens(tokens=tokens, asked=asked)


def pairs_probe(token_ids: torch.Tensor, *, pairs: int, rows: int, seed: int) -> ProbeTokens:
    """List keys with their values, then every key again in another order: its value is the answer.

    Args:
        token_ids: [n], what is drawn from; at least twice `pairs` of them.
        pairs: keys.
        rows: sequences.
        seed: of the draws, and of the order.
    """
    drawn = _drawn(token_ids, 2 * pairs, rows, seed).unflatten(1, (pairs, 2))
    generator = torch.Generator().manual_seed(seed + 1)
    order = torch.rand(rows, pairs, generator=generator).argsort(1)
    again = drawn.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
    tokens = torch.cat((drawn, again), 1).flatten(1)
    asked = torch.zeros(rows, 4 * pairs - 1, dtype=torch.bool)
    asked[:, 2 * pairs :: 2] = True
    return ProbeTokens(tokens=tokens, asked=asked)


def _drawn(token_ids: torch.Tensor, count: int, rows: int, seed: int) -> torch.Tensor:
    """Return [rows, count] of the tokens; within a row each at most once."""
    assert len(token_ids) >= count
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, len(token_ids), generator=generator).argsort(1)[:, :count]
    return token_ids[order]
