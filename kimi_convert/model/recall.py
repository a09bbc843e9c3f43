"""Probes of what a model can look up in its context: copying, induction, recall of pairs.

Each draws random tokens, so that nothing but the context can tell the answer. Accuracy is the
share of answers that are the most likely next token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from kimi_convert.config.architecture import ModelConfig

# Enough answers for a standard error of 2 to 4 % of all at most, in some 8000 tokens together.
_SPAN, _SPANS = 64, 16
_BEFORE, _LOOKUPS = 64, 48
_PAIRS, _LISTS = 16, 16
_LEAST_IDS = 4  # that a probe can be drawn from
_LOGITS_BYTES = 32 * 1024 * 1024

Head = Callable[[torch.Tensor], torch.Tensor]  # hidden [n, D] -> logits [n, vocab]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedProbe:
    """A probe, and what it is called in a report."""

    name: str
    size: int
    probe: ProbeTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """How many answers of a probe are the most likely next token."""

    name: str  # "copying", "induction" or "pairs"
    size: int  # tokens of the span or before the last, or pairs
    answers: int
    student: float  # share of them
    teacher: float | None

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return asdict(self)


def probes_of(text: torch.Tensor, config: ModelConfig, *, seed: int) -> tuple[SizedProbe, ...]:
    """Return the probes that can be drawn from the ids of a text, smaller where they are few.

    Args:
        text: int64, of any shape; ids that mark beginnings, ends and padding are not drawn.
        config: names those.
        seed: of the draws.
    """
    marks = {config.bos_token_id, config.pad_token_id, *config.eos_token_ids}
    token_ids = torch.tensor([token for token in text.unique().tolist() if token not in marks])
    count = len(token_ids)
    if count < _LEAST_IDS:
        return ()
    span, before, pairs = min(_SPAN, count), min(_BEFORE, count), min(_PAIRS, count // 2)
    copying = copying_probe(token_ids, span=span, rows=_SPANS, seed=seed)
    induction = induction_probe(token_ids, length=before, rows=_LOOKUPS, seed=seed)
    recall = pairs_probe(token_ids, pairs=pairs, rows=_LISTS, seed=seed)
    return (
        SizedProbe(name="copying", size=span, probe=copying),
        SizedProbe(name="induction", size=before, probe=induction),
        SizedProbe(name="pairs", size=pairs, probe=recall),
    )


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


def accuracy(probe: ProbeTokens, hidden: torch.Tensor, head: Head) -> float:
    """Return the share of answers that are the most likely token after hidden [N, T, D]."""
    asked, answers = hidden[probe.asked.to(hidden.device)], probe.answers.to(hidden.device)
    width = head(asked[:1]).shape[-1]
    size = max(1, _LOGITS_BYTES // (4 * width))
    right = sum(
        int((head(part).argmax(-1) == expected).sum())
        for part, expected in zip(asked.split(size), answers.split(size), strict=True)
    )
    return right / len(answers)


def _drawn(token_ids: torch.Tensor, count: int, rows: int, seed: int) -> torch.Tensor:
    """Return [rows, count] of the tokens; within a row each at most once."""
    assert len(token_ids) >= count
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, len(token_ids), generator=generator).argsort(1)[:, :count]
    return token_ids[order]
