"""Text that the teacher writes itself: more to train on where there is less text than training.

A text that is met twenty times is learned by heart. What the teacher says of its own sentences is as
much to learn from, and new each time. Every row begins with a piece of the given text and goes on as
the teacher draws, token by token, from its own predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.model.cache import ModelCache, new_cache

_STAGE = "writing text"
_PROMPT = 16  # tokens
_BYTES_ON_CPU = 2**30  # for rows side by side; on a GPU half of what is free
_TOLD_EVERY = 16  # tokens of a row


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
        on_progress: told of tokens.
    """
    flat, length = text.flatten(), text.shape[1]
    prompt = min(_PROMPT, length - 1)
    places = torch.Generator().manual_seed(seed)
    draws = torch.Generator(device).manual_seed(seed + 1)
    first = torch.randint(len(flat) - prompt + 1, (rows, 1), generator=places)
    prompts = flat[first + torch.arange(prompt)]
    parts = prompts.split(rows_side_by_side(config, length, _free_bytes(device)))
    written: list[torch.Tensor] = []
    for part in parts:
        before = sum(map(torch.numel, written))

        def tell(tokens: int, before: int = before) -> None:
            on_progress(ProgressEvent(_STAGE, before + tokens, rows * length, "tokens"))

        written.append(_continued(writer, config, part.to(device), length, draws, tell).cpu())
    on_progress(ProgressEvent(_STAGE, rows * length, rows * length, "tokens"))
    return torch.cat(written)


def rows_side_by_side(config: ModelConfig, length: int, nbytes: int) -> int:
    """Return how many rows of so many tokens can be written at once in so much memory, at least 1.

    A row needs its caches, which grow by being copied, the keys and values that the heads of one layer
    see, and logits, odds and draws; all counted as fp32.
    """
    width = 4 * (config.mla.kv_lora_rank + config.mla.qk_rope_head_dim)
    caches = 2 * config.num_layers * length * width
    attended = 2 * config.mla.num_heads * length * width
    return max(1, nbytes // (caches + attended + 3 * 4 * config.vocab_size))


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _BYTES_ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2


def _continued(
    writer: Writer,
    config: ModelConfig,
    prompts: torch.Tensor,
    length: int,
    draws: torch.Generator,
    tell: Callable[[int], None],
) -> torch.Tensor:
    # On a GPU layers compute in bf16; a wider cache would be rounded anew at every token.
    dtype = torch.float32 if prompts.device.type == "cpu" else torch.bfloat16
    cache = new_cache(config, len(prompts), dtype=dtype, device=prompts.device)
    tokens, last = [prompts], prompts
    for n in range(prompts.shape[1], length):
        if n % _TOLD_EVERY == 0:
            tell(n * len(prompts))
        odds = writer(last, cache).softmax(-1)
        last = torch.multinomial(odds, 1, generator=draws)
        tokens.append(last)
    return torch.cat(tokens, 1)
