"""SwiGLU and mixtures of experts as nodes; `kimi_convert.model.moe` has the equations.

Routed experts have two forms. Active: a loop over the experts that some token chose, in standard
operators, on weights as checkpoints store them. Fused: com.microsoft::MoE, which wants the rows of
gate and up interleaved, and turns what it is told of the experts into a softmax over the chosen: it
is given the logarithms of their weights, and its output is multiplied by the weights' sum.

In shapes: N tokens, D width, E experts, k choices, F expert hidden, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from kimi_convert.config.architecture import MoeConfig, Scoring, TopkMethod
from kimi_convert.exporters.onnx.builder import GraphBuilder
from kimi_convert.exporters.onnx.functions import MICROSOFT
from kimi_convert.exporters.onnx.model_builder import FLOAT, ModelBuilder
from kimi_convert.exporters.onnx.options import MoeForm
from kimi_convert.exporters.onnx.weights import PROJECTIONS, StackedExperts

_RENORMALIZE_EPS = 1e-20
_SMALLEST = float(np.finfo(np.float32).tiny)
_UNCHOSEN = -1e30
# How many of a group's best experts count for the group; methods that are not here have no groups.
_COUNTED = {TopkMethod.NOAUX_TC: 2, TopkMethod.GROUP_LIMITED_GREEDY: 1}


class Routing(NamedTuple):
    """The experts of each token and the factors on their outputs."""

    weights: ir.Value  # [N, k] fp32
    experts: ir.Value  # [N, k] int64


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
        form = {MoeForm.ACTIVE: _active_experts, MoeForm.FUSED: _fused_experts}[m.options.moe_form]
        routed = form(m, x, routing, layer_idx)
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
    logits = m.op("Gemm", x, m.weight(prefix + "router.weight"), attributes={"transB": 1})
    if sizes.scoring is Scoring.SIGMOID:
        scores = m.op("Sigmoid", logits, name="scores")
    else:
        scores = m.op("Softmax", logits, attributes={"axis": -1}, name="scores")
    biased = sizes.has_correction_bias or m.config.model_type == "kimi_linear"
    choice = m.op("Add", scores, m.weight(prefix + "router.bias")) if biased else scores
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


def _active_experts(m: ModelBuilder, x: ir.Value, routing: Routing, layer_idx: int) -> ir.Value:
    """Loop over the experts that some token chose, each over its tokens alone."""
    stacked = m.store.experts(layer_idx)
    segments = [m.add_initializer(segment) for segment in stacked.segments]
    (chosen,) = m.ops(
        "Unique", m.reshape(routing.experts, -1), attributes={"sorted": 1}, names=("active",)
    )
    start = m.op("Mul", x, m.number(0.0))
    always = m.constant(np.array(True), "true")
    body = _one_expert(m, x, routing, chosen, segments, stacked)
    return m.op("Loop", m.op("Size", chosen), always, start, attributes={"body": body})


def _one_expert(
    m: ModelBuilder,
    x: ir.Value,
    routing: Routing,
    chosen: ir.Value,
    segments: list[ir.Value],
    stacked: StackedExperts,
) -> ir.Graph:
    """Return the body of the loop: add one expert's weighted outputs to the sum [N, D]."""
    sizes = m.config.moe
    assert sizes is not None
    b = m.body("expert")
    turn = b.value("turn", ir.DataType.INT64, ())
    go = b.value("go", ir.DataType.BOOL, ())
    total = b.value("total", FLOAT)
    expert = b.op("Gather", chosen, turn, attributes={"axis": 0})
    ours = b.cast(b.op("Equal", routing.experts, expert), FLOAT)
    weight = b.op(
        *("ReduceSum", b.op("Mul", ours, routing.weights), m.integers(-1)),
        attributes={"keepdims": 0},
    )  # [N]
    choices = b.op("ReduceMax", ours, m.integers(-1), attributes={"keepdims": 0})
    tokens = b.op("Squeeze", b.op("NonZero", choices), m.integers(0))
    matrices = {
        projection: _expert_matrix(m, b, stacked, segments, projection, expert)
        for projection in PROJECTIONS
    }
    mine = b.op("Gather", x, tokens, attributes={"axis": 0})
    gate, up = (_product(b, mine, matrices[name]) for name in ("gate", "up"))
    output = _product(b, b.op("Mul", b.silu(gate), up), matrices["down"])
    factor = b.op("Unsqueeze", b.op("Gather", weight, tokens), m.integers(-1))
    summed = b.op(
        "ScatterND",
        *(total, b.op("Unsqueeze", tokens, m.integers(-1)), b.op("Mul", output, factor)),
        attributes={"reduction": "add"},
    )
    going = b.op("Identity", go)
    going.type, going.shape = go.type, go.shape
    summed.type = total.type
    return ir.Graph((turn, go, total), (going, summed), nodes=b.nodes, name="expert")


def _expert_matrix(
    m: ModelBuilder,
    b: GraphBuilder,
    stacked: StackedExperts,
    segments: list[ir.Value],
    projection: str,
    expert: ir.Value,
) -> ir.Value:
    """Return one expert's matrix [out, in] in fp32."""
    sizes, width = m.config.moe, m.config.hidden_size
    assert sizes is not None
    rows = stacked.rows[projection]
    table = m.constant(np.array(rows, dtype=np.int64), f"rows.{'_'.join(map(str, rows))}")
    row = b.op("Gather", table, expert, attributes={"axis": 0})
    flat = _row_of_segments(m, b, segments, row)
    if segments[0].dtype is not FLOAT:
        flat = b.cast(flat, FLOAT)
    hidden = sizes.intermediate_size
    shape = (width, hidden) if projection == "down" else (hidden, width)
    return b.op("Reshape", flat, m.integers(*shape))


def _row_of_segments(
    m: ModelBuilder, b: GraphBuilder, segments: Sequence[ir.Value], row: ir.Value
) -> ir.Value:
    """Return one row, counted through all segments, without joining these."""
    first, *others = segments
    if not others:
        return b.op("Gather", first, row, attributes={"axis": 0})
    assert first.shape is not None
    rows = first.shape[0]
    assert isinstance(rows, int)
    count = m.integer(rows)
    here, there = b.body("here"), b.body("there")
    taken = here.op("Gather", first, row, attributes={"axis": 0})
    passed = _row_of_segments(m, there, others, there.op("Sub", row, count))
    branches = {
        "then_branch": ir.Graph((), (taken,), nodes=here.nodes, name="here"),
        "else_branch": ir.Graph((), (passed,), nodes=there.nodes, name="there"),
    }
    return b.op("If", b.op("Less", row, count), attributes=branches)


def _product(b: GraphBuilder, x: ir.Value, matrix: ir.Value) -> ir.Value:
    return b.op("Gemm", x, matrix, attributes={"transB": 1})


def _fused_experts(m: ModelBuilder, x: ir.Value, routing: Routing, layer_idx: int) -> ir.Value:
    """Run com.microsoft::MoE."""
    sizes = m.config.moe
    assert sizes is not None
    gate_up, down = (m.add_initializer(t) for t in m.store.fused_experts(layer_idx))
    logs = m.op("Log", m.op("Max", routing.weights, m.number(_SMALLEST)))
    shape = m.concat(
        m.op("Shape", routing.experts, attributes={"start": 0, "end": 1}),
        m.integers(sizes.num_experts),
        axis=0,
    )
    unchosen = m.op("Expand", m.number(_UNCHOSEN), shape)
    told = m.op(
        "ScatterElements", unchosen, routing.experts, logs, attributes={"axis": 1}, name="logs"
    )
    mixed = m.op(
        "MoE",
        *(x, told, m.as_float(gate_up), None, m.as_float(down)),
        attributes={
            "k": sizes.num_experts_per_token,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": 1,
        },
        domain=MICROSOFT,
        name="routed",
    )
    total = m.op("ReduceSum", routing.weights, m.integers(-1), attributes={"keepdims": 1})
    return m.op("Mul", mixed, total)
