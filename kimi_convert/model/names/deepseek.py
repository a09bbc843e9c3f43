"""Names of DeepSeek-V2, DeepSeek-V3, Moonlight and Kimi-K2 checkpoints: data only."""

from __future__ import annotations

from kimi_convert.checkpoints.mapping import Drop, Name, holes

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."
_EXPERT = _MLP + "experts.{expert}."
_SHARED = _MLP + "shared_experts."

NAMES = (
    Name("embed.weight", "model.embed_tokens.weight", ("vocab", "hidden")),
    Name("layers.{layer}.input_norm.weight", _LAYER + "input_layernorm.weight", ("hidden",)),
    Name(
        "layers.{layer}.mla.q.weight", _ATTENTION + "q_proj.weight", ("q", "hidden"), "mla_full_q"
    ),
    Name(
        "layers.{layer}.mla.q_a.weight",
        _ATTENTION + "q_a_proj.weight",
        ("q_latent", "hidden"),
        "mla_low_rank_q",
    ),
    Name(
        "layers.{layer}.mla.q_a_norm.weight",
        _ATTENTION + "q_a_layernorm.weight",
        ("q_latent",),
        "mla_low_rank_q",
    ),
    Name(
        "layers.{layer}.mla.q_b.weight",
        _ATTENTION + "q_b_proj.weight",
        ("q", "q_latent"),
        "mla_low_rank_q",
    ),
    Name(
        "layers.{layer}.mla.kv_a.weight",
        _ATTENTION + "kv_a_proj_with_mqa.weight",
        ("kv_a", "hidden"),
        "mla",
    ),
    Name(
        "layers.{layer}.mla.kv_a_norm.weight",
        _ATTENTION + "kv_a_layernorm.weight",
        ("kv_latent",),
        "mla",
    ),
    Name(
        "layers.{layer}.mla.kv_b.weight",
        _ATTENTION + "kv_b_proj.weight",
        ("kv_b", "kv_latent"),
        "mla",
    ),
    Name(
        "layers.{layer}.mla.o.weight", _ATTENTION + "o_proj.weight", ("hidden", "attention"), "mla"
    ),
    Name(
        "layers.{layer}.mlp_norm.weight",
        _LAYER + "post_attention_layernorm.weight",
        ("hidden",),
    ),
    Name(
        "layers.{layer}.mlp.gate.weight", _MLP + "gate_proj.weight", ("dense", "hidden"), "dense"
    ),
    Name("layers.{layer}.mlp.up.weight", _MLP + "up_proj.weight", ("dense", "hidden"), "dense"),
    Name(
        "layers.{layer}.mlp.down.weight", _MLP + "down_proj.weight", ("hidden", "dense"), "dense"
    ),
    Name("layers.{layer}.moe.router.weight", _MLP + "gate.weight", ("experts", "hidden"), "moe"),
    Name(
        "layers.{layer}.moe.router.bias",
        _MLP + "gate.e_score_correction_bias",
        ("experts",),
        "moe_bias",
    ),
    Name(
        "layers.{layer}.moe.experts.{expert}.gate.weight",
        _EXPERT + "gate_proj.weight",
        ("expert", "hidden"),
        "moe",
    ),
    Name(
        "layers.{layer}.moe.experts.{expert}.up.weight",
        _EXPERT + "up_proj.weight",
        ("expert", "hidden"),
        "moe",
    ),
    Name(
        "layers.{layer}.moe.experts.{expert}.down.weight",
        _EXPERT + "down_proj.weight",
        ("hidden", "expert"),
        "moe",
    ),
    Name(
        "layers.{layer}.moe.shared.gate.weight",
        _SHARED + "gate_proj.weight",
        ("shared", "hidden"),
        "moe_shared",
    ),
    Name(
        "layers.{layer}.moe.shared.up.weight",
        _SHARED + "up_proj.weight",
        ("shared", "hidden"),
        "moe_shared",
    ),
    Name(
        "layers.{layer}.moe.shared.down.weight",
        _SHARED + "down_proj.weight",
        ("hidden", "shared"),
        "moe_shared",
    ),
    Name("norm.weight", "model.norm.weight", ("hidden",)),
    Name("head.weight", "lm_head.weight", ("vocab", "hidden"), "untied"),
)

_INVERSE_FREQUENCIES = "rotary frequencies are recomputed from config.json"
_MTP = "multi-token-prediction layers have no place in the target format"
# What an MTP layer holds besides a decoder layer.
MTP_ONLY = (
    _LAYER + "embed_tokens.weight",
    _LAYER + "enorm.weight",
    _LAYER + "hnorm.weight",
    _LAYER + "eh_proj.weight",
    _LAYER + "shared_head.norm.weight",
    _LAYER + "shared_head.head.weight",
)


def drops_beside(names: tuple[Name, ...]) -> tuple[Drop, ...]:
    """Return what a checkpoint with these names may hold besides, and nothing reads.

    An MTP layer is a decoder layer whose number follows the last one, with tensors of its own.
    """
    return (
        Drop(_ATTENTION + "rotary_emb.inv_freq", _INVERSE_FREQUENCIES, "all_and_mtp"),
        *(Drop(name, _MTP, "mtp") for name in MTP_ONLY),
        *(Drop(row.checkpoint, _MTP, "mtp") for row in names if "layer" in holes(row.checkpoint)),
    )


DROPS = drops_beside(NAMES)
