"""The architecture of one model as frozen, checked data.

One `ModelConfig` describes both sides of a conversion: a source whose every layer is MLA with
RoPE (DeepSeek-V2, DeepSeek-V3, Moonlight, Kimi-K2), and hybrids of KDA and MLA: Kimi-Linear, whose
MLA is NoPE, and Ling-3 (bailing_hybrid), whose MLA rotates and has a gate for each head.
How it is spelled in config.json is `config.huggingface`'s business. Layers count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kimi_convert.config.limits import (
    MAX_CONV_SIZE,
    MAX_EXPERTS_IN_ALL,
    MAX_HEADS,
    MAX_INTEGER,
    MAX_LAYERS,
    MAX_WIDTH,
    require,
    require_size,
)

WEIGHT_DTYPES = ("bfloat16", "float16", "float32")  # torch's names


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
        """Refuse factors below 1, ramps that run backwards, and magnitudes below 1."""
        require(1 <= self.factor <= 1e6, "rope_scaling.factor", "1 to 1000000", self.factor)
        name = "rope_scaling.original_max_position_embeddings"
        require_size(name, self.original_max_positions, MAX_INTEGER)
        slow, fast = self.beta_slow, self.beta_fast
        require(0 < slow <= 1e6, "rope_scaling.beta_slow", "above 0 and at most 1000000", slow)
        require(
            slow <= fast <= 1e6, "rope_scaling.beta_fast", f"beta_slow ({slow}) to 1000000", fast
        )
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            require(0 <= value <= 1e3, f"rope_scaling.{name}", "0 to 1000", value)

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
        require(1 < self.theta <= 1e12, "rope_theta", "above 1 and at most 1e12", self.theta)


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
    gated: bool = False  # each head's output times sigmoid(w . x)

    def __post_init__(self) -> None:
        """Refuse sizes that no tensor can have."""
        require_size("num_attention_heads", self.num_heads, MAX_HEADS)
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            require_size(name, getattr(self, name), MAX_WIDTH)
        if self.q_lora_rank is not None:
            require_size("q_lora_rank", self.q_lora_rank, MAX_WIDTH)
        require_size("qk_rope_head_dim", self.qk_rope_head_dim, MAX_WIDTH, least=0)
        require(
            self.qk_rope_head_dim % 2 == 0,
            "qk_rope_head_dim",
            "an even number",
            self.qk_rope_head_dim,
        )

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
    # One matrix each for the decay's and the output's gate, where Kimi-Linear has two of low rank.
    full_rank_gates: bool = False
    lower_bound: float | None = None  # of the log decay, natural; None: no bound

    def __post_init__(self) -> None:
        """Refuse sizes that no tensor can have, and a bound that lets nothing fade."""
        bound = self.lower_bound
        require(
            bound is None or -100 <= bound < 0, "kda_lower_bound", "-100 up to, not with, 0", bound
        )
        require_size("linear_attn_config.num_heads", self.num_heads, MAX_HEADS)
        require_size("linear_attn_config.head_dim", self.head_dim, MAX_WIDTH)
        require_size("linear_attn_config.short_conv_kernel_size", self.conv_size, MAX_CONV_SIZE)


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
        """Refuse sizes that no tensor can have, and routing that cannot choose its experts."""
        require_size("n_routed_experts or num_experts", self.num_experts, MAX_EXPERTS_IN_ALL)
        require_size("moe_intermediate_size", self.intermediate_size, MAX_WIDTH)
        require_size(
            "n_shared_experts or num_shared_experts", self.num_shared_experts, MAX_WIDTH, least=0
        )
        require_size("first_k_dense_replace", self.first_dense_layers, MAX_LAYERS, least=0)
        require_size("moe_layer_freq", self.layer_freq, MAX_LAYERS)
        scale = self.routed_scaling_factor
        require(0 < scale <= 1e6, "routed_scaling_factor", "above 0 and at most 1000000", scale)
        self._check_choice()

    def _check_choice(self) -> None:
        """Refuse groups that do not divide the experts, or hold fewer than are to be chosen."""
        groups = "n_group or num_expert_group"
        require_size(groups, self.num_groups, self.num_experts)
        require(
            self.num_experts % self.num_groups == 0,
            groups,
            f"a divisor of the number of experts ({self.num_experts})",
            self.num_groups,
        )
        require_size("topk_group", self.topk_groups, self.num_groups)
        require_size(
            "num_experts_per_tok or num_experts_per_token",
            self.num_experts_per_token,
            self.topk_groups * (self.num_experts // self.num_groups),
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
            require_size(name, getattr(self, name), MAX_WIDTH)
        require_size("num_hidden_layers", self.num_layers, MAX_LAYERS)
        require_size("num_nextn_predict_layers", self.num_mtp_layers, MAX_LAYERS, least=0)
        require_size(
            "max_position_embeddings or model_max_length", self.max_positions, MAX_INTEGER
        )
        eps, spread = self.rms_norm_eps, self.initializer_range
        require(0 < eps <= 1, "rms_norm_eps", "above 0 and at most 1", eps)
        require(0 <= spread <= 1e3, "initializer_range", "0 to 1000", spread)
        require(self.dtype in WEIGHT_DTYPES, "dtype", " or ".join(WEIGHT_DTYPES), self.dtype)
        self._check_layers()

    def _check_layers(self) -> None:
        """Refuse layer sets that do not fit, and more experts than can be enumerated."""
        ordered = tuple(sorted(set(self.kda_layers))) == self.kda_layers
        inside = all(0 <= layer < self.num_layers for layer in self.kda_layers)
        require(
            ordered and inside,
            "kda_layers",
            f"increasing layer numbers below {self.num_layers}",
            self.kda_layers,
        )
        require(
            (self.kda is None) == (not self.kda_layers),
            "linear_attn_config",
            "KDA sizes if and only if there are KDA layers",
            self.kda,
        )
        experts = self.moe.num_experts if self.moe else 0
        layers = self.num_layers + self.num_mtp_layers
        require(
            experts * layers <= MAX_EXPERTS_IN_ALL,
            "n_routed_experts or num_experts",
            f"at most {MAX_EXPERTS_IN_ALL} experts in all layers",
            f"{experts} in each of {layers} layers",
        )

    @property
    def mla_layers(self) -> tuple[int, ...]:
        """Layers whose mixer is full attention."""
        kda_layers = frozenset(self.kda_layers)
        return tuple(i for i in range(self.num_layers) if i not in kda_layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers whose feed-forward is a mixture of experts."""
        if self.moe is None:
            return ()
        return tuple(i for i in range(self.num_layers) if self.moe.is_moe_layer(i))
