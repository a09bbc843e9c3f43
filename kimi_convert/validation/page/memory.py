"""What a model keeps of the tokens it has seen, in bytes by their number: from the config alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import ModelConfig

_CONTEXTS = tuple(2**power for power in range(8, 21))  # 256 tokens to a million
_STATE_BYTES = torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """Bytes for one sequence of so many tokens."""

    tokens: int
    states: int  # of KDA layers: the same for any length
    cache: int  # of MLA layers: latents and shared keys
    all_mla: int  # if every layer were MLA


def memory_by_context(config: ModelConfig) -> tuple[MemoryPoint, ...]:
    """Return what one sequence takes at lengths from 256 to a million tokens.

    KDA keeps a state [H, K, V] in fp32 and the last W - 1 inputs of three convolutions, MLA the
    R + r latent and key dims of every token, both in the config's dtype.
    """
    item = getattr(torch, config.dtype).itemsize
    per_token = (config.mla.kv_lora_rank + config.mla.qk_rope_head_dim) * item
    states = 0
    if config.kda is not None:
        heads, width = config.kda.num_heads, config.kda.head_dim
        inputs = 3 * (config.kda.conv_size - 1) * heads * width * item
        states = len(config.kda_layers) * (heads * width * width * _STATE_BYTES + inputs)
    return tuple(
        MemoryPoint(
            tokens,
            states,
            len(config.mla_layers) * per_token * tokens,
            config.num_layers * per_token * tokens,
        )
        for tokens in _CONTEXTS
    )
