"""config.json of Kimi-Linear: the released spelling, and transformers' own."""

from __future__ import annotations

from kimi_convert.config.architecture import (
    KdaConfig,
    ModelConfig,
    MoeConfig,
    Scoring,
    TopkMethod,
)
from kimi_convert.config.fields import Fields
from kimi_convert.config.layer_lists import kda_layers_of, leading_dense_layers
from kimi_convert.config.shared_fields import (
    carried_fields,
    parse_mla,
    parse_scoring,
    parse_shared,
    parse_topk_method,
    shared_to_json,
    written_fields,
)
from kimi_convert.errors import ConfigError

TARGET_TYPE = "kimi_linear"
_ARCHITECTURE = "KimiLinearForCausalLM"


def parse_kimi_linear(fields: Fields, model_type: str) -> ModelConfig:
    """Read a hybrid config; its MLA layers must be NoPE, as every loader assumes."""
    fields.expect("mla_use_nope", True)
    shared = parse_shared(fields, model_type)
    mla = parse_mla(fields, rope=None)
    linear = fields.nested("linear_attn_config") or fields.inside("linear_attn_config", {})
    kda_layers = kda_layers_of(fields, linear, shared["num_layers"])
    kda = KdaConfig(
        num_heads=_size(linear, "num_heads", fields, "linear_num_heads"),
        head_dim=_size(linear, "head_dim", fields, "linear_head_dim"),
        conv_size=_size(linear, "short_conv_kernel_size", fields, "linear_conv_kernel_dim"),
    )
    linear.refuse_rest()
    return ModelConfig(
        **shared,
        mla=mla,
        kda=kda,
        kda_layers=kda_layers,
        moe=_parse_moe(fields, shared["num_layers"]),
        carried=carried_fields(fields, _written(shared["hidden_size"], mla.num_heads)),
    )


def kimi_linear_to_json(config: ModelConfig) -> dict[str, object]:
    """Spell a hybrid config with every field of the released one, inert ones included."""
    document: dict[str, object] = {
        **_written(config.hidden_size, config.mla.num_heads),
        **config.carried,
        **shared_to_json(config),
        "model_max_length": config.max_positions,
    }
    assert config.kda is not None, "a config without KDA layers is not read as Kimi-Linear"
    document["linear_attn_config"] = {
        "full_attn_layers": [layer + 1 for layer in config.mla_layers],
        "head_dim": config.kda.head_dim,
        "kda_layers": [layer + 1 for layer in config.kda_layers],
        "num_heads": config.kda.num_heads,
        "short_conv_kernel_size": config.kda.conv_size,
    }
    if config.moe is not None:
        document |= _moe_to_json(config.moe)
    return document


def _written(hidden_size: int, num_heads: int) -> dict[str, object]:
    return {
        **written_fields(_ARCHITECTURE),
        "mla_use_nope": True,
        "head_dim": hidden_size // num_heads,  # used by no layer
        # Inert where nothing rotates, but mlx-lm refuses a config without them.
        "rope_theta": 10000.0,
        "rope_scaling": None,
    }


def _parse_moe(fields: Fields, num_layers: int) -> MoeConfig | None:
    num_experts = fields.optional_integer("num_experts", "num_local_experts")
    first_dense_layers = leading_dense_layers(fields, num_layers)
    if num_experts is None:
        return None
    num_groups = fields.integer("num_expert_group", "n_group", default=1)
    if not fields.boolean("use_grouped_topk", default=True) and num_groups != 1:
        raise ConfigError(
            "config fields 'use_grouped_topk' and 'num_expert_group' contradict each other",
            found=f"false and {num_groups} groups",
        )
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_token=fields.integer("num_experts_per_token", "num_experts_per_tok"),
        num_shared_experts=fields.integer("num_shared_experts", "n_shared_experts", default=0),
        intermediate_size=fields.integer("moe_intermediate_size"),
        first_dense_layers=first_dense_layers,
        layer_freq=fields.integer("moe_layer_freq", default=1),
        scoring=parse_scoring(fields, "moe_router_activation_func", default=Scoring.SIGMOID),
        topk_method=parse_topk_method(fields, default=TopkMethod.NOAUX_TC),
        renormalize=fields.boolean("moe_renormalize", "norm_topk_prob", default=True),
        routed_scaling_factor=fields.number("routed_scaling_factor", default=1.0),
        num_groups=num_groups,
        topk_groups=fields.integer("topk_group", default=1),
    )


def _moe_to_json(moe: MoeConfig) -> dict[str, object]:
    document: dict[str, object] = {
        "num_experts": moe.num_experts,
        "num_experts_per_token": moe.num_experts_per_token,
        "num_shared_experts": moe.num_shared_experts,
        "moe_intermediate_size": moe.intermediate_size,
        "first_k_dense_replace": moe.first_dense_layers,
        "moe_layer_freq": moe.layer_freq,
        "moe_router_activation_func": str(moe.scoring),
        "moe_renormalize": moe.renormalize,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "use_grouped_topk": True,
        "num_expert_group": moe.num_groups,
        "topk_group": moe.topk_groups,
    }
    if moe.topk_method is not TopkMethod.NOAUX_TC:
        document["topk_method"] = str(moe.topk_method)
    return document


def _size(linear: Fields, name: str, fields: Fields, native_name: str) -> int:
    """Read a KDA size in the released spelling, else in transformers' own."""
    released = linear.optional_integer(name)
    native = fields.optional_integer(native_name)
    if released is not None and native is not None and released != native:
        raise ConfigError(
            f"config fields 'linear_attn_config.{name}' and {native_name!r} contradict each other",
            found=f"{released} and {native}",
        )
    value = native if released is None else released
    if value is None:
        raise ConfigError(f"config field 'linear_attn_config.{name}' is missing")
    return value
