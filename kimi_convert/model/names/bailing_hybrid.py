"""Names of Ling-3 checkpoints (bailing_hybrid), as released: data only.

Norms, feed-forwards and the output head are named as in DeepSeek's checkpoints.
"""

from __future__ import annotations

from kimi_convert.checkpoints.mapping import Name, Storage
from kimi_convert.model.names import deepseek

_ATTENTION = "model.layers.{layer}.attention."
_MLA = "layers.{layer}.mla."
_KDA = "layers.{layer}.kda."


def _kda(param: str, checkpoint: str, *shape: str, storage: Storage = Storage.WEIGHT) -> Name:
    return Name(_KDA + param, _ATTENTION + checkpoint, shape, "kda", storage)


_KDA_NAMES = (
    _kda("q.weight", "q_proj.weight", "kda", "hidden"),
    _kda("k.weight", "k_proj.weight", "kda", "hidden"),
    _kda("v.weight", "v_proj.weight", "kda", "hidden"),
    _kda("q_conv.weight", "q_conv1d.weight", "kda", "one", "conv"),
    _kda("k_conv.weight", "k_conv1d.weight", "kda", "one", "conv"),
    _kda("v_conv.weight", "v_conv1d.weight", "kda", "one", "conv"),
    _kda("A_log", "A_log", "kda_heads", storage=Storage.FP32),
    _kda("dt_bias", "dt_bias", "kda", storage=Storage.FP32),
    _kda("f.weight", "f_proj.weight", "kda", "hidden"),
    _kda("b.weight", "b_proj.weight", "kda_heads", "hidden"),
    _kda("g.weight", "g_proj.weight", "kda", "hidden"),
    _kda("o_norm.weight", "o_norm.weight", "kda_head_dim"),
    # transformers' saver names the output of both mixers alike; only it reads that back.
    Name(
        _KDA + "o.weight",
        _ATTENTION + "o_proj.weight",
        ("hidden", "kda"),
        "kda",
        aliases=(_ATTENTION + "dense.weight",),
    ),
)
_MLA_GATE = Name(
    _MLA + "gate.weight", _ATTENTION + "g_proj.weight", ("mla_heads", "hidden"), "mla"
)

# Our parameter -> the name that differs from DeepSeek's.
_RENAMED = {
    "embed.weight": "model.word_embeddings.weight",
    _MLA + "q.weight": _ATTENTION + "q_proj.weight",
    _MLA + "q_a.weight": _ATTENTION + "q_a_proj.weight",
    _MLA + "q_a_norm.weight": _ATTENTION + "q_a_layernorm.weight",
    _MLA + "q_b.weight": _ATTENTION + "q_b_proj.weight",
    _MLA + "kv_a.weight": _ATTENTION + "kv_a_proj_with_mqa.weight",
    _MLA + "kv_a_norm.weight": _ATTENTION + "kv_a_layernorm.weight",
    _MLA + "kv_b.weight": _ATTENTION + "kv_b_proj.weight",
    _MLA + "o.weight": _ATTENTION + "dense.weight",
    "layers.{layer}.moe.router.bias": "model.layers.{layer}.mlp.gate.expert_bias",
}


def _ling(row: Name) -> Name:
    name = _RENAMED.get(row.param, row.checkpoint)
    # Every loader expects the bias of the choice in every mixture of experts.
    return Name(row.param, name, row.shape, "moe" if row.where == "moe_bias" else row.where)


_SHARED_NAMES = tuple(_ling(row) for row in deepseek.NAMES)
_MIXERS_AT = 2  # KDA rows stand where MLA rows do: after the embedding and the input norm
NAMES = (
    *_SHARED_NAMES[:_MIXERS_AT],
    *_KDA_NAMES,
    _MLA_GATE,
    *_SHARED_NAMES[_MIXERS_AT:],
)
DROPS = deepseek.drops_beside(NAMES)
