"""What a model keeps of one sequence by its length, beside what it would keep were it all MLA."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.model.cache_size import cache_size, latent_bytes

_CONTEXTS = tuple(2**power for power in range(8, 21))  # 256 tokens to a million


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """Bytes for one sequence of so many tokens."""

    tokens: int
    states: int  # of KDA layers: the same for any length
    cache: int  # of MLA layers: latents and shared keys
    all_mla: int  # if every layer were MLA


def memory_by_context(config: ModelConfig) -> tuple[MemoryPoint, ...]:
    """Return what one sequence takes at lengths from 256 to a million tokens, as `cache_size` says."""
    size = cache_size(config)
    all_mla = config.num_layers * latent_bytes(config)
    return tuple(
        MemoryPoint(
            tokens, size.bytes_per_sequence, tokens * size.bytes_per_token, tokens * all_mla
        )
        for tokens in _CONTEXTS
    )
