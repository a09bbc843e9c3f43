"""How long a checkpoint writes the same as its teacher, both taking the likeliest token.

The one measurement that needs whole models, for every token is read before the next is written;
they are loaded one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.model.cache import new_cache
from kimi_convert.model.loading import Model, load_model
from kimi_convert.validation.options import ValidationOptions
from kimi_convert.validation.report import GreedyAgreement, Parting

_PROMPTS = 8
_PROMPT_TOKENS = 64
# The teacher gives the student's token at least 0.9 of what it gives its own.
_NEAR_TIE = -math.log(0.9)

_Choose = Callable[[torch.Tensor], torch.Tensor]  # log probabilities [B, vocab] -> ids [B]


@torch.inference_mode()
def measure_greedy(
    checkpoint: Path,
    tokens: torch.Tensor,
    *,
    teacher: Path,
    options: ValidationOptions,
    on_progress: ProgressCallback,
) -> GreedyAgreement:
    """Let both models continue the beginnings of sequences that lie evenly in a text.

    Args:
        checkpoint: the student's folder.
        tokens: [N, T] int64.
        teacher: the teacher's folder.
        options: dtype, device, numerics and backend.
        on_progress: told of every token of either model.
    """
    at = torch.linspace(0, len(tokens) - 1, min(_PROMPTS, len(tokens))).round().long()
    prompts = tokens[at, :_PROMPT_TOKENS].to(options.device)

    def told(done: int) -> None:
        on_progress(ProgressEvent("writing greedily", done, 2 * options.greedy_tokens, "tokens"))

    length = options.greedy_tokens
    written = _continue(_load(checkpoint, options), prompts, _likeliest, length, told)
    gaps: list[torch.Tensor] = []

    def compare(log_probs: torch.Tensor) -> torch.Tensor:
        own = _likeliest(log_probs)
        others = written[:, len(gaps), None]
        gaps.append((log_probs.amax(-1) - log_probs.gather(-1, others)[:, 0]).cpu())
        return own

    expected = _continue(
        _load(teacher, options), prompts, compare, length, lambda done: told(length + done)
    )
    return agreement(written.cpu(), expected.cpu(), torch.stack(gaps, 1), prompts.shape[1])


def agreement(
    written: torch.Tensor, expected: torch.Tensor, gaps: torch.Tensor, prompt_tokens: int
) -> GreedyAgreement:
    """Compare continuations: after they part they are two texts, and nothing is compared.

    Args:
        written: [B, n] ids of the student.
        expected: [B, n] ids of the teacher.
        gaps: [B, n] nats, by the teacher, after what the teacher has written so far.
        prompt_tokens: how long each prompt is.
    """
    partings: list[Parting | None] = []
    for row, differs in enumerate(written != expected):
        after = int(differs.int().argmax()) if bool(differs.any()) else None
        partings.append(
            None if after is None else Parting(after=after, gap=gaps[row, after].item())
        )
    length = expected.shape[1]
    equal = [length if one is None else one.after for one in partings]
    return GreedyAgreement(
        prompts=len(partings),
        prompt_tokens=prompt_tokens,
        new_tokens=length,
        agreed=sum(equal) / (length * len(equal)),
        partings=tuple(partings),
        near_tie=_NEAR_TIE,
    )


def _continue(
    model: Model, prompts: torch.Tensor, choose: _Choose, length: int, told: Callable[[int], None]
) -> torch.Tensor:
    """Return the ids [B, n] that follow prompts [B, T]."""
    weight = model.embed.weight
    assert isinstance(weight, torch.Tensor)
    cache = new_cache(model.config, len(prompts), dtype=weight.dtype, device=weight.device)
    ids: list[torch.Tensor] = []
    given = prompts
    for step in range(length):
        told(step)
        ids.append(choose(model(given, cache)[:, -1].log_softmax(-1)))
        given = ids[-1][:, None]
    told(length)
    return torch.stack(ids, 1)


def _likeliest(log_probs: torch.Tensor) -> torch.Tensor:
    return log_probs.argmax(-1)


def _load(folder: Path, options: ValidationOptions) -> Model:
    return load_model(
        folder,
        dtype=options.torch_dtype,
        device=options.device,
        numerics=options.numerics,
        backend=options.backend,
    )
