"""Names of Kimi-Linear checkpoints, as released: data only.

Norms, embeddings and MLA layers are named as in DeepSeek's checkpoints. transformers' own saver
writes a dense layer's feed-forward under `block_sparse_moe`, which only transformers reads back:
that spelling is accepted as an alias and never written.
"""

from __future__ import annotations

from kimi_convert.checkpoints.mapping import Name, Storage
from kimi_convert.model.names import deepseek

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MOE = _LAYER + "block_sparse_moe."
_EXPERT = _MOE + "experts.{expert}."
_KDA = "layers.{layer}.kda."


def _kda(param: str, checkpoint: str, *shape: str) -> Name:
    return Name(_KDA + param, _ATTENTION + checkpoint, shape, "kda")


_KDA_NAMES = (
    _kda("q.weight", "q_proj.weight", "kda", "hidden"),
    _kda("k.weight", "k_proj.weight", "kda", "hidden"),
    _kda("v.weight", "v_proj.weight", "kda", "hidden"),
    _kda("q_conv.weight", "q_conv1d.weight", "kda", "one", "conv"),
    _kda("k_conv.weight", "k_conv1d.weight", "kda", "one", "conv"),
    _kda("v_conv.weight", "v_conv1d.weight", "kda", "one", "conv"),
    Name(
        _KDA + "A_log",
        _ATTENTION + "A_log",
        ("one", "one", "kda_heads", "one"),
        "kda",
        Storage.FP32,
    ),
    Name(_KDA + "dt_bias", _ATTENTION + "dt_bias", ("kda",), "kda", Storage.FP32),
    _kda("f_a.weight", "f_a_proj.weight", "kda_head_dim", "hidden"),
    _kda("f_b.weight", "f_b_proj.weight", "kda", "kda_head_dim"),
    _kda("b.weight", "b_proj.weight", "kda_heads", "hidden"),
    _kda("g_a.weight", "g_a_proj.weight", "kda_head_dim", "hidden"),
    _kda("g_b.weight", "g_b_proj.weight", "kda", "kda_head_dim"),
    _kda("o_norm.weight", "o_norm.weight", "kda_head_dim"),
    _kda("o.weight", "o_proj.weight", "hidden", "kda"),
)

# Our parameter -> the name that differs from DeepSeek's.
_RENAMED = {
    "layers.{layer}.moe.router.weight": _MOE + "gate.weight",
    "layers.{layer}.moe.router.bias": _MOE + "gate.e_score_correction_bias",
    "layers.{layer}.moe.experts.{expert}.gate.weight": _EXPERT + "w1.weight",
    "layers.{layer}.moe.experts.{expert}.up.weight": _EXPERT + "w3.weight",
    "layers.{layer}.moe.experts.{expert}.down.weight": _EXPERT + "w2.weight",
    "layers.{layer}.moe.shared.gate.weight": _MOE + "shared_experts.gate_proj.weight",
    "layers.{layer}.moe.shared.up.weight": _MOE + "shared_experts.up_proj.weight",
    "layers.{layer}.moe.shared.down.weight": _MOE + "shared_experts.down_proj.weight",
}
_ALIASES = {
    "layers.{layer}.mlp.gate.weight": (_MOE + "gate_proj.weight",),
    "layers.{layer}.mlp.up.weight": (_MOE + "up_proj.weight",),
    "layers.{layer}.mlp.down.weight": (_MOE + "down_proj.weight",),
}


def _hybrid(row: Name) -> Name:
    return Name(
        row.param,
        _RENAMED.get(row.param, row.checkpoint),
        row.shape,
        # Every Kimi-Linear loader expects the correction bias in every mixture of experts.
        "moe" if row.where == "moe_bias" else row.where,
        row.storage,
        _ALIASES.get(row.param, ()),
    )


_SHARED_NAMES = tuple(_hybrid(row) for row in deepseek.NAMES)
_MIXERS_AT = 2  # KDA rows stand where MLA rows do: after the embedding and the input norm
NAMES = _SHARED_NAMES[:_MIXERS_AT] + _KDA_NAMES + _SHARED_NAMES[_MIXERS_AT:]
# No released model has MTP layers; vLLM skips them by number, like DeepSeek's.
DROPS = deepseek.drops_beside(NAMES)
