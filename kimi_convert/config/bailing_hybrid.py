"""config.json of Ling-3 (bailing_hybrid): KDA with a bounded decay, and MLA that rotates and is gated.

Layers are in groups whose last is MLA. transformers also reads `layer_types`, which may put them
anywhere; the group's size is written beside it for loaders that read nothing else. transformers
5.23 makes layers of an incomplete last group KDA, mlx-lm and llama.cpp MLA, so there the types
must be stated.
"""

from __future__ import annotations

from kimi_convert.config.architecture import KdaConfig, ModelConfig, MoeConfig
from kimi_convert.config.fields import Fields
from kimi_convert.config.layer_lists import kda_layers_by_type, leading_dense_layers
from kimi_convert.config.rope import parse_rope, rope_to_json
from kimi_convert.config.shared_fields import (
    carried_fields,
    parse_mla,
    parse_shared,
    shared_to_json,
    written_fields,
)
from kimi_convert.errors import ConfigError

BAILING_TYPE = "bailing_hybrid"
LOWER_BOUND = -5.0  # of every released model
_ARCHITECTURE = "BailingHybridForCausalLM"
_THETA = 6_000_000.0
_GROUP = 4
_TYPES = {True: "linear_attention", False: "full_attention"}


def parse_bailing_hybrid(fields: Fields, model_type: str) -> ModelConfig:
    """Read a Ling-3 config.

    Raises:
        ConfigError: it is one of the older models of this type, which have no KDA, or leaves open
            which layers are KDA.
    """
    if fields.optional_integer("short_conv_kernel_size", "linear_conv_kernel_dim") is None:
        raise ConfigError(
            f"this {BAILING_TYPE} model is not supported",
            expected="one with KDA layers, whose config.json has short_conv_kernel_size",
            hint="Models before Ling-3 have the same type and another linear attention.",
        )
    fields.expect("kda_safe_gate", True, None)
    fields.expect("no_kda_lora", True, None)
    fields.expect("rope_interleave", True, None)
    fields.expect("score_function", "sigmoid", None)
    shared = parse_shared(fields, model_type)
    mla = parse_mla(fields, rope=parse_rope(fields, default_theta=_THETA), gated=True)
    # transformers writes its own `head_dim`, which is that of what rotates.
    head_dim = fields.optional_integer("linear_head_dim")
    stated = fields.optional_integer("head_dim")
    kda = KdaConfig(
        num_heads=fields.integer("linear_num_heads", default=mla.num_heads),
        head_dim=head_dim or stated or mla.v_head_dim,
        conv_size=fields.integer("short_conv_kernel_size", "linear_conv_kernel_dim"),
        full_rank_gates=True,
        lower_bound=fields.number("kda_lower_bound", default=LOWER_BOUND),
    )
    return ModelConfig(
        **shared,
        mla=mla,
        kda=kda,
        kda_layers=_kda_layers(fields, shared["num_layers"]),
        moe=_parse_moe(fields, shared["num_layers"]),
        carried=carried_fields(fields, _written()),
    )


def bailing_hybrid_to_json(config: ModelConfig) -> dict[str, object]:
    """Spell a Ling-3 config."""
    assert config.kda is not None, "a config without KDA layers is not read as Ling-3"
    kda_layers = frozenset(config.kda_layers)
    document: dict[str, object] = {
        **_written(),
        **config.carried,
        **shared_to_json(config),
        **rope_to_json(config.mla.rope),
        "max_position_embeddings": config.max_positions,
        "head_dim": config.kda.head_dim,
        "short_conv_kernel_size": config.kda.conv_size,
        "kda_lower_bound": config.kda.lower_bound,
        "layer_group_size": _GROUP,
        "layer_types": [_TYPES[layer in kda_layers] for layer in range(config.num_layers)],
        "first_k_dense_replace": config.num_layers,
    }
    if config.moe is not None:
        document |= {
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.num_experts_per_token,
            "num_shared_experts": config.moe.num_shared_experts,
            "moe_intermediate_size": config.moe.intermediate_size,
            "first_k_dense_replace": config.moe.first_dense_layers,
            "norm_topk_prob": config.moe.renormalize,
            "routed_scaling_factor": config.moe.routed_scaling_factor,
            "n_group": config.moe.num_groups,
            "topk_group": config.moe.topk_groups,
        }
    return document


def _written() -> dict[str, object]:
    return {
        **written_fields(_ARCHITECTURE),
        "kda_safe_gate": True,
        "no_kda_lora": True,
        "rope_interleave": True,
        "score_function": "sigmoid",
    }


def _kda_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    typed = kda_layers_by_type(fields, num_layers)
    group = fields.optional_integer("layer_group_size")
    if typed is not None:
        return typed
    if group is None or group < 1 or num_layers % group:
        raise ConfigError(
            "config does not say which layers are KDA",
            expected="layer_types, or a layer_group_size that divides num_hidden_layers",
            found=f"layer_group_size {group} and {num_layers} layers",
            hint="Loaders disagree on an incomplete last group; write layer_types.",
        )
    return tuple(layer for layer in range(num_layers) if (layer + 1) % group)


def _parse_moe(fields: Fields, num_layers: int) -> MoeConfig | None:
    dense = leading_dense_layers(fields, num_layers)
    num_experts = fields.optional_integer("num_experts", "num_local_experts")
    if num_experts is None:
        return None
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_token=fields.integer("num_experts_per_tok", "num_experts_per_token"),
        num_shared_experts=fields.integer("num_shared_experts", "n_shared_experts", default=1),
        intermediate_size=fields.integer("moe_intermediate_size"),
        first_dense_layers=dense,
        renormalize=fields.boolean("norm_topk_prob", "moe_renormalize", default=True),
        routed_scaling_factor=fields.number("routed_scaling_factor", default=1.0),
        num_groups=fields.integer("n_group", "num_expert_group", default=1),
        topk_groups=fields.integer("topk_group", default=1),
    )
