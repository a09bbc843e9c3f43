"""The architecture of one model as frozen, checked data.

One `ModelConfig` describes both sides of a conversion: a source whose every layer is MLA with
RoPE (DeepSeek-V2, DeepSeek-V3, Moonlight, Kimi-K2) and a Kimi-Linear hybrid of KDA and NoPE MLA.
How it is spelled in config.json is `config.huggingface`'s business. Layers count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kimi_convert.errors import ConfigError


class Scoring(StrEnum):
    """How router logits become expert scores."""

    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"


class TopkMethod(StrEnum):
    """How experts are chosen from their scores; the names are DeepSeek's `topk_method`."""

    NOAUX_TC = "noaux_tc"  # score + correction bias; a group counts its two best choices
    GREEDY = "greedy"  # plain top-k
    GROUP_LIMITED_GREEDY = "group_limited_greedy"  # a group counts its best score


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071) as DeepSeek applies it."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        """Refuse factors below 1 and empty ramps."""
        _require(self.factor >= 1, "rope_scaling.factor", "at least 1", self.factor)
        _require_positive(
            "rope_scaling.original_max_position_embeddings", self.original_max_positions
        )

    @property
    def softmax_scale_factor(self) -> float:
        """The factor m^2 on the softmax scale: m = 0.1 mscale_all_dim ln(factor) + 1."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    @property
    def rotation_factor(self) -> float:
        """The factor on cos and sin; 1 in every released configuration."""
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the `qk_rope_head_dim` part of q and k."""

    theta: float
    interleaved: bool = True  # pairs (2j, 2j+1); else (j, j + dim/2)
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        """Refuse a base that cannot give frequencies."""
        _require(self.theta > 1, "rope_theta", "above 1", self.theta)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention. `rope` is None where nothing rotates (NoPE)."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig | None

    def __post_init__(self) -> None:
        """Refuse sizes that no tensor can have."""
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            _require_positive(name, getattr(self, name))
        _require_positive("num_attention_heads", self.num_heads)
        if self.q_lora_rank is not None:
            _require_positive("q_lora_rank", self.q_lora_rank)
        even = self.qk_rope_head_dim >= 0 and self.qk_rope_head_dim % 2 == 0
        _require(even, "qk_rope_head_dim", "an even number", self.qk_rope_head_dim)

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on q k^T, with YaRN's share where the layer rotates."""
        yarn = self.rope.yarn if self.rope else None
        return self.qk_head_dim**-0.5 * (yarn.softmax_scale_factor if yarn else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class KdaConfig:
    """Kimi Delta Attention. Key and value heads are square: `head_dim` serves both."""

    num_heads: int
    head_dim: int
    conv_size: int = 4

    def __post_init__(self) -> None:
        """Refuse sizes that no tensor can have."""
        _require_positive("linear_attn_config.num_heads", self.num_heads)
        _require_positive("linear_attn_config.head_dim", self.head_dim)
        _require_positive("linear_attn_config.short_conv_kernel_size", self.conv_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Mixture of experts: routed experts, always-on shared experts, and which layers have them."""

    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    intermediate_size: int
    first_dense_layers: int  # layers before this one are dense
    layer_freq: int = 1
    scoring: Scoring = Scoring.SIGMOID
    topk_method: TopkMethod = TopkMethod.NOAUX_TC
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1

    def __post_init__(self) -> None:
        """Refuse routing that cannot choose the experts it must choose."""
        _require_positive("moe_intermediate_size", self.intermediate_size)
        _require_positive("moe_layer_freq", self.layer_freq)
        _require_positive("num_expert_group", self.num_groups)
        _require(
            self.num_shared_experts >= 0, "num_shared_experts", ">= 0", self.num_shared_experts
        )
        _require(
            0 < self.num_experts_per_token <= self.num_experts,
            "num_experts_per_token",
            f"1 to num_experts ({self.num_experts})",
            self.num_experts_per_token,
        )
        _require(
            self.num_experts % self.num_groups == 0,
            "num_expert_group",
            f"a divisor of num_experts ({self.num_experts})",
            self.num_groups,
        )
        _require(
            0 < self.topk_groups <= self.num_groups,
            "topk_group",
            f"1 to num_expert_group ({self.num_groups})",
            self.topk_groups,
        )
        reachable = self.topk_groups * (self.num_experts // self.num_groups)
        _require(
            self.num_experts_per_token <= reachable,
            "num_experts_per_token",
            f"at most the {reachable} experts of topk_group groups",
            self.num_experts_per_token,
        )

    @property
    def has_correction_bias(self) -> bool:
        """Whether the router carries `e_score_correction_bias`."""
        return self.topk_method is TopkMethod.NOAUX_TC

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Tell whether a layer's feed-forward is a mixture of experts."""
        return layer_idx >= self.first_dense_layers and layer_idx % self.layer_freq == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A whole model. `kda_layers` is empty for a source, and `kda` None with it."""

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    intermediate_size: int  # of the dense feed-forward layers
    rms_norm_eps: float
    max_positions: int
    mla: MlaConfig
    kda: KdaConfig | None = None
    kda_layers: tuple[int, ...] = ()
    moe: MoeConfig | None = None
    num_mtp_layers: int = 0
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"  # torch's name
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    quantization: Mapping[str, object] | None = None  # quantization_config, as it stands
    carried: Mapping[str, object] = field(default_factory=dict[str, object])  # unknown fields

    def __post_init__(self) -> None:
        """Refuse what cannot be a model."""
        for name in ("hidden_size", "vocab_size", "intermediate_size"):
            _require_positive(name, getattr(self, name))
        _require_positive("num_hidden_layers", self.num_layers)
        _require(self.rms_norm_eps > 0, "rms_norm_eps", "above 0", self.rms_norm_eps)
        _require(self.num_mtp_layers >= 0, "num_nextn_predict_layers", ">= 0", self.num_mtp_layers)
        ordered = tuple(sorted(set(self.kda_layers))) == self.kda_layers
        inside = all(0 <= layer < self.num_layers for layer in self.kda_layers)
        _require(
            ordered and inside,
            "kda_layers",
            f"increasing layer numbers below {self.num_layers}",
            self.kda_layers,
        )
        _require(
            (self.kda is None) == (not self.kda_layers),
            "linear_attn_config",
            "KDA sizes if and only if there are KDA layers",
            self.kda,
        )

    @property
    def mla_layers(self) -> tuple[int, ...]:
        """Layers whose mixer is full attention."""
        return tuple(i for i in range(self.num_layers) if i not in set(self.kda_layers))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers whose feed-forward is a mixture of experts."""
        if self.moe is None:
            return ()
        return tuple(i for i in range(self.num_layers) if self.moe.is_moe_layer(i))


def _require(holds: bool, field_name: str, expected: object, found: object) -> None:
    if not holds:
        raise ConfigError(
            f"config field {field_name!r} is not valid", expected=expected, found=found
        )


def _require_positive(field_name: str, value: int) -> None:
    _require(value > 0, field_name, "a number above 0", value)
