"""SwiGLU, and the routing of mixtures of experts, as nodes; `kimi_convert.model.moe` has the equations.

In shapes: N tokens, D width, E experts, k choices, G groups.
"""

from __future__ import annotations

import onnx_ir as ir

from kimi_convert.config.architecture import MoeConfig, Scoring, TopkMethod
from kimi_convert.exporters.onnx.experts import Routing, routed_experts
from kimi_convert.exporters.onnx.model_builder import ModelBuilder

_RENORMALIZE_EPS = 1e-20
# How many of a group's best experts count for the group; methods that are not here have no groups.
_COUNTED = {TopkMethod.NOAUX_TC: 2, TopkMethod.GROUP_LIMITED_GREEDY: 1}


def feed_forward(m: ModelBuilder, x: ir.Value, layer_idx: int) -> ir.Value:
    """Map rows x [N, D], normalised, to [N, D]."""
    if layer_idx not in m.config.moe_layers:
        return swiglu(m, x, f"layers.{layer_idx}.mlp.")
    sizes = m.config.moe
    assert sizes is not None
    prefix = f"layers.{layer_idx}.moe."
    with m.scope("router"):
        routing = _route(m, x, prefix, sizes)
    with m.scope("experts"):
        routed = routed_experts(m, x, routing, layer_idx)
    if not sizes.num_shared_experts:
        return routed
    with m.scope("shared"):
        return m.op("Add", routed, swiglu(m, x, prefix + "shared."))


def swiglu(m: ModelBuilder, x: ir.Value, prefix: str) -> ir.Value:
    """Return down(silu(gate x) up x)."""
    gate = m.linear(x, prefix + "gate.weight", name="gate")
    up = m.linear(x, prefix + "up.weight", name="up")
    return m.linear(m.op("Mul", m.silu(gate), up), prefix + "down.weight", name="down")


def _route(m: ModelBuilder, x: ir.Value, prefix: str, sizes: MoeConfig) -> Routing:
    """Choose k experts per token, all in fp32."""
    weight = m.wide_weight(prefix + "router.weight")
    logits = m.op("Gemm", m.widen(x), weight, attributes={"transB": 1}, name="logits")
    if sizes.scoring is Scoring.SIGMOID:
        scores = m.op("Sigmoid", logits, name="scores")
    else:
        scores = m.op("Softmax", logits, attributes={"axis": -1}, name="scores")
    biased = sizes.has_correction_bias or m.config.model_type == "kimi_linear"
    choice = m.op("Add", scores, m.wide_weight(prefix + "router.bias")) if biased else scores
    if sizes.num_groups > 1 and sizes.topk_method in _COUNTED:
        choice = _within_best_groups(m, choice, sizes)
    _, experts = _top(m, choice, sizes.num_experts_per_token)
    weights = m.op("GatherElements", scores, experts, attributes={"axis": 1})
    if sizes.renormalize:
        total = m.op("ReduceSum", weights, m.integers(-1), attributes={"keepdims": 1})
        weights = m.op("Div", weights, m.op("Add", total, m.number(_RENORMALIZE_EPS)))
    factor = m.number(sizes.routed_scaling_factor)
    return Routing(m.op("Mul", weights, factor, name="weights"), experts)


def _within_best_groups(m: ModelBuilder, choice: ir.Value, sizes: MoeConfig) -> ir.Value:
    """Return choice scores [N, E], minus infinity for experts of groups that are not kept."""
    per_group = sizes.num_experts // sizes.num_groups
    groups = m.reshape(choice, 0, sizes.num_groups, per_group)  # [N, G, E / G]
    best, _ = _top(m, groups, min(_COUNTED[sizes.topk_method], per_group))
    group_scores = m.op("ReduceSum", best, m.integers(-1), attributes={"keepdims": 0})
    kept_scores, kept = _top(m, group_scores, sizes.topk_groups)
    none = m.op("ConstantOfShape", m.op("Shape", group_scores))
    one = m.op("Add", m.op("Mul", kept_scores, m.number(0.0)), m.number(1.0))
    mask = m.op("ScatterElements", none, kept, one, attributes={"axis": 1})
    keep = m.op("Unsqueeze", m.cast(mask, ir.DataType.BOOL), m.integers(-1))
    limited = m.op("Where", keep, groups, m.number(float("-inf")))
    return m.reshape(limited, 0, sizes.num_experts)


def _top(m: ModelBuilder, scores: ir.Value, count: int) -> tuple[ir.Value, ir.Value]:
    values, indices = m.ops(
        "TopK",
        *(scores, m.integers(count)),
        attributes={"axis": -1, "largest": 1, "sorted": 1},
        names=("best", "indices"),
    )
    return values, indices
