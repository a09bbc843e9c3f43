"""config.json of the MLA sources: DeepSeek-V2, DeepSeek-V3 (Moonlight, R1) and Kimi-K2."""

from __future__ import annotations

from kimi_convert.config.architecture import ModelConfig, MoeConfig, Scoring, TopkMethod
from kimi_convert.config.fields import REQUIRED, Fields
from kimi_convert.config.rope import parse_rope, rope_to_json
from kimi_convert.config.shared_fields import (
    carried_fields,
    parse_mla,
    parse_scoring,
    parse_shared,
    parse_topk_method,
    shared_to_json,
    written_fields,
)

_VERSION_2 = "deepseek_v2"
_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
}
SOURCE_TYPES = tuple(_ARCHITECTURES)


def parse_deepseek(fields: Fields, model_type: str) -> ModelConfig:
    """Read a source config.

    DeepSeek's code and transformers disagree on what a DeepSeek-V3 config means that leaves out
    its routing, so there it must be complete. What transformers itself leaves out has one meaning
    for each version: the scoring function and how experts are chosen.
    """
    shared = parse_shared(fields, model_type)
    mla = parse_mla(fields, rope=parse_rope(fields))
    moe = _parse_moe(fields, version_2=model_type == _VERSION_2)
    carried = carried_fields(fields, written_fields(_ARCHITECTURES[model_type]))
    return ModelConfig(**shared, mla=mla, moe=moe, carried=carried)


def deepseek_to_json(config: ModelConfig) -> dict[str, object]:
    """Spell a source config."""
    document: dict[str, object] = {
        **written_fields(_ARCHITECTURES[config.model_type]),
        **config.carried,
        **shared_to_json(config),
        "max_position_embeddings": config.max_positions,
        **rope_to_json(config.mla.rope),
    }
    if config.moe is not None:
        document |= {
            "n_routed_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.num_experts_per_token,
            "n_shared_experts": config.moe.num_shared_experts,
            "moe_intermediate_size": config.moe.intermediate_size,
            "first_k_dense_replace": config.moe.first_dense_layers,
            "moe_layer_freq": config.moe.layer_freq,
            "scoring_func": str(config.moe.scoring),
            "topk_method": str(config.moe.topk_method),
            "norm_topk_prob": config.moe.renormalize,
            "routed_scaling_factor": config.moe.routed_scaling_factor,
            "n_group": config.moe.num_groups,
            "topk_group": config.moe.topk_groups,
        }
    return document


def _parse_moe(fields: Fields, *, version_2: bool) -> MoeConfig | None:
    num_experts = fields.optional_integer("n_routed_experts", "num_local_experts")
    if num_experts is None:
        return None
    scoring = Scoring.SOFTMAX if version_2 else Scoring.SIGMOID
    method = TopkMethod.GREEDY if version_2 else TopkMethod.NOAUX_TC
    none, one = (0, 1) if version_2 else (REQUIRED, REQUIRED)
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_token=fields.integer("num_experts_per_tok"),
        num_shared_experts=fields.integer("n_shared_experts", default=none),
        intermediate_size=fields.integer("moe_intermediate_size"),
        first_dense_layers=fields.integer("first_k_dense_replace", default=none),
        layer_freq=fields.integer("moe_layer_freq", default=1),
        scoring=parse_scoring(fields, "scoring_func", default=scoring),
        topk_method=parse_topk_method(fields, default=method),
        renormalize=fields.boolean("norm_topk_prob", default=not version_2),
        routed_scaling_factor=fields.number("routed_scaling_factor", default=one),
        num_groups=fields.integer("n_group", default=one),
        topk_groups=fields.integer("topk_group", default=one),
    )
