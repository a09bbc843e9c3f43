"""Text that the teacher writes itself: more to train on where there is less text than training.

A text that is met twenty times is learned by heart. What the teacher says of its own sentences is as
much to learn from, and new each time. Every row begins with a piece of the given text and goes on as
the teacher draws, token by token, from its own predictions.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.model.cache import ModelCache, new_cache

_STAGE = "writing text"
_PROMPT = 16  # tokens
_ROWS_ON_GPU, _ROWS_ON_CPU = 2048, 64  # side by side


class Writer(Protocol):
    """A language model that goes on from a cache."""

    def __call__(self, tokens: torch.Tensor, cache: ModelCache) -> torch.Tensor:
        """Return logits of the next token [B, vocab] after tokens [B, T]."""
        ...


@torch.no_grad()
def written_rows(
    writer: Writer,
    config: ModelConfig,
    text: torch.Tensor,
    *,
    rows: int,
    seed: int,
    device: torch.device,
    on_progress: ProgressCallback,
) -> torch.Tensor:
    """Return rows [rows, T] int64, on the CPU.

    Args:
        writer: the teacher.
        config: its.
        text: [L, T], where rows begin: at any place, with so many tokens.
        rows: how many.
        seed: of the places and of the draws.
        device: where the writer runs.
        on_progress: told of rows.
    """
    flat, length = text.flatten(), text.shape[1]
    prompt = min(_PROMPT, length - 1)
    places = torch.Generator().manual_seed(seed)
    draws = torch.Generator(device).manual_seed(seed + 1)
    first = torch.randint(len(flat) - prompt + 1, (rows, 1), generator=places)
    prompts = flat[first + torch.arange(prompt)]
    side_by_side = _ROWS_ON_CPU if device.type == "cpu" else _ROWS_ON_GPU
    parts: list[torch.Tensor] = []
    for part in prompts.split(side_by_side):
        on_progress(ProgressEvent(_STAGE, len(parts) * side_by_side, rows, "rows"))
        parts.append(_continued(writer, config, part.to(device), length, draws).cpu())
    on_progress(ProgressEvent(_STAGE, rows, rows, "rows"))
    return torch.cat(parts)


def _continued(
    writer: Writer,
    config: ModelConfig,
    prompts: torch.Tensor,
    length: int,
    draws: torch.Generator,
) -> torch.Tensor:
    cache = new_cache(config, len(prompts), dtype=torch.float32, device=prompts.device)
    tokens, last = [prompts], prompts
    for _ in range(length - prompts.shape[1]):
        odds = writer(last, cache).softmax(-1)
        last = torch.multinomial(odds, 1, generator=draws)
        tokens.append(last)
    return torch.cat(tokens, 1)
