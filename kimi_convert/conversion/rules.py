"""Which source parameters each target parameter is made from, and by which operation: data only.

Unlike the naming tables, rules may share sources and have no inverse: one latent projection of
MLA feeds the keys and the values of KDA. `plan` expands them; `transforms` holds the operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Op(StrEnum):
    """The operations; every one but COPY, QUANTIZE, DEQUANTIZE and FITTED is a function in `transforms`."""

    COPY = "copy"  # the stored bytes, unchanged
    QUANTIZE = "quantize"  # the values, or their scales, of FP8 blocks
    DEQUANTIZE = "dequantize"  # the stored values times their scales, rounded once
    KEEP_QUERY = "keep_query"  # rows of a kept layer's q
    DOUBLE = "double"  # twice the values: exact, and undone by a gate of one half
    TAKE_QUERY = "take_query"
    FOLD_QUERY = "fold_query"
    FOLD_KEY = "fold_key"
    FOLD_VALUE = "fold_value"
    QUERY_TAPS = "query_taps"
    FOLDED_QUERY_TAPS = "folded_query_taps"
    KEY_TAPS = "key_taps"
    VALUE_TAPS = "value_taps"
    SCALE_OUTPUT = "scale_output"
    DECAY_RATE = "decay_rate"
    DECAY_BIAS = "decay_bias"
    BOUNDED_BIAS = "bounded_bias"
    RANDOM = "random"
    ZEROS = "zeros"
    OUTPUT_GAIN = "output_gain"
    FITTED = "fitted"  # by a calibration, in place of the rule's own operation


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of target parameter. `where` is a layer set of the source."""

    target: str
    op: Op
    sources: tuple[str, ...] = ()
    where: str = "all"


_L = "layers.{layer}."
_KEPT = _L + "mla."
_KDA = _L + "kda."

_COPIED = (
    "embed.weight",
    "norm.weight",
    "head.weight",
    _L + "input_norm.weight",
    _L + "mlp_norm.weight",
    _KEPT + "q_a.weight",
    _KEPT + "q_a_norm.weight",
    _KEPT + "kv_a.weight",
    _KEPT + "kv_a_norm.weight",
    _KEPT + "kv_b.weight",
    _KEPT + "o.weight",
    *(_L + f"mlp.{part}.weight" for part in ("gate", "up", "down")),
    _L + "moe.router.weight",
    *(_L + "moe.experts.{expert}." + f"{part}.weight" for part in ("gate", "up", "down")),
    *(_L + f"moe.shared.{part}.weight" for part in ("gate", "up", "down")),
)

_FULL_QUERY = (_KEPT + "q.weight",)
_LOW_RANK_QUERY = (_KEPT + "q_a.weight", _KEPT + "q_a_norm.weight", _KEPT + "q_b.weight")
_LATENT = (_KEPT + "kv_a.weight", _KEPT + "kv_a_norm.weight", _KEPT + "kv_b.weight")
_INPUT = (_L + "input_norm.weight",)

RULES = (
    *(Rule(name, Op.COPY, (name,)) for name in _COPIED),
    Rule(_L + "moe.router.bias", Op.COPY, (_L + "moe.router.bias",), "moe_bias"),
    Rule(_L + "moe.router.bias", Op.ZEROS, (), "moe_unbiased"),
    # Layers that stay MLA.
    Rule(_KEPT + "q.weight", Op.KEEP_QUERY, _FULL_QUERY),
    Rule(_KEPT + "q_b.weight", Op.KEEP_QUERY, (_KEPT + "q_b.weight",)),
    # Layers that become KDA.
    Rule(_KDA + "q.weight", Op.TAKE_QUERY, _FULL_QUERY, "mla_full_q"),
    Rule(_KDA + "q.weight", Op.FOLD_QUERY, _LOW_RANK_QUERY, "mla_low_rank_q"),
    Rule(_KDA + "k.weight", Op.FOLD_KEY, _LATENT),
    Rule(_KDA + "v.weight", Op.FOLD_VALUE, _LATENT),
    Rule(_KDA + "q_conv.weight", Op.QUERY_TAPS, _INPUT + _FULL_QUERY, "mla_full_q"),
    Rule(_KDA + "q_conv.weight", Op.FOLDED_QUERY_TAPS, _INPUT + _LOW_RANK_QUERY, "mla_low_rank_q"),
    Rule(_KDA + "k_conv.weight", Op.KEY_TAPS, _INPUT + _LATENT),
    Rule(_KDA + "v_conv.weight", Op.VALUE_TAPS, _INPUT + _LATENT),
    Rule(_KDA + "A_log", Op.DECAY_RATE),
    Rule(_KDA + "dt_bias", Op.DECAY_BIAS),
    Rule(_KDA + "f_a.weight", Op.RANDOM),
    Rule(_KDA + "f_b.weight", Op.ZEROS),
    Rule(_KDA + "b.weight", Op.ZEROS),
    Rule(_KDA + "g_a.weight", Op.RANDOM),
    Rule(_KDA + "g_b.weight", Op.ZEROS),
    Rule(_KDA + "o_norm.weight", Op.OUTPUT_GAIN),
    Rule(_KDA + "o.weight", Op.SCALE_OUTPUT, (_KEPT + "o.weight", *_INPUT, *_LATENT)),
)

# Ling-3: layers that stay rotate as before, and have a gate, which is set to a half and made up for.
_LING_ALONE = (
    Rule(_KEPT + "q.weight", Op.COPY, _FULL_QUERY),
    Rule(_KEPT + "q_b.weight", Op.COPY, (_KEPT + "q_b.weight",)),
    Rule(_KEPT + "gate.weight", Op.ZEROS),
    Rule(_KEPT + "o.weight", Op.DOUBLE, (_KEPT + "o.weight",)),
    Rule(_KDA + "A_log", Op.ZEROS),
    Rule(_KDA + "dt_bias", Op.BOUNDED_BIAS),
    Rule(_KDA + "f.weight", Op.ZEROS),
    Rule(_KDA + "g.weight", Op.ZEROS),
)
_LOW_RANK_GATES = frozenset(_KDA + f"{name}.weight" for name in ("f_a", "f_b", "g_a", "g_b"))
_REPLACED = frozenset(rule.target for rule in _LING_ALONE) | _LOW_RANK_GATES
LING_RULES = (*(rule for rule in RULES if rule.target not in _REPLACED), *_LING_ALONE)

# Of a layer: it takes part in a choice alone.
WITHOUT_GRADIENT = frozenset({"moe.router.bias"})

# What a calibration gives without gradients: every mixer that is new, and of those that stay the
# output, and the query where it changes. Training moves all of a mixer, and of the rest what it is
# asked to.


def is_solved(rule: Rule) -> bool:
    """Tell whether a calibration without gradients gives a rule's target."""
    return (
        rule.target.startswith(_KDA)
        or rule.target == _KEPT + "o.weight"
        or rule.op is Op.KEEP_QUERY
    )


def is_trained(target: str, *, everything: bool) -> bool:
    """Tell whether a calibration with gradients gives a rule's target.

    Args:
        target: of the rule.
        everything: whether more than mixers is trained.
    """
    mixers = target.startswith((_KDA, _KEPT))
    return mixers or (everything and target.removeprefix(_L) not in WITHOUT_GRADIENT)
