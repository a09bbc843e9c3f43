"""How many bytes a model remembers of one sequence while it generates, from its config alone.

An MLA layer keeps its latent and the shared part of the key for each token; a KDA layer keeps one
state and the last inputs of its convolutions, however long the sequence is.
"""

from __future__ import annotations

from dataclasses import dataclass

from kimi_convert.config.architecture import ModelConfig

CONTEXTS = tuple(1024 * 4**power for power in range(1, 6))  # 4K to 1M tokens
_VALUE_BYTES = 2  # bf16, as models are served
_STATE_BYTES = 4  # fp32, in which every implementation keeps it


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What is kept for one sequence."""

    bytes_per_token: int
    bytes_per_sequence: int  # whatever its length

    def at(self, tokens: int) -> int:
        """Return the bytes for a sequence of so many tokens."""
        return self.bytes_per_sequence + tokens * self.bytes_per_token

    def to_json(self) -> dict[str, object]:
        """Return the fields, and the bytes at some lengths."""
        return {
            "bytes_per_token": self.bytes_per_token,
            "bytes_per_sequence": self.bytes_per_sequence,
            "bytes_at": {str(tokens): self.at(tokens) for tokens in CONTEXTS},
        }


def cache_size(config: ModelConfig) -> CacheSize:
    """Return what a model keeps, its MLA layers in their compressed form."""
    kda = config.kda
    per_token = len(config.mla_layers) * latent_bytes(config)
    if kda is None:
        return CacheSize(per_token, 0)
    state = kda.num_heads * kda.head_dim**2 * _STATE_BYTES
    inputs = 3 * kda.num_heads * kda.head_dim * (kda.conv_size - 1) * _VALUE_BYTES
    return CacheSize(per_token, len(config.kda_layers) * (state + inputs))


def latent_bytes(config: ModelConfig) -> int:
    """Return what one MLA layer keeps of one token: its latent and the shared part of its key."""
    return (config.mla.kv_lora_rank + config.mla.qk_rope_head_dim) * _VALUE_BYTES
