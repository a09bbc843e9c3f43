"""Routed experts as nodes, in two forms.

Active: a loop over the experts that some token chose, in standard operators, on weights as checkpoints
store them. Fused: com.microsoft's MoE, or QMoE for integers, which want the rows of gate and up
interleaved, and turn what they are told of the experts into a softmax over the chosen: they are given
the logarithms of their weights, and the output is multiplied by the weights' sum.

In shapes: N tokens, D width, E experts, k choices, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from kimi_convert.exporters.onnx.builder import GraphBuilder
from kimi_convert.exporters.onnx.domains import MICROSOFT
from kimi_convert.exporters.onnx.model_builder import FLOAT, INT8_ACTIVATIONS, ModelBuilder
from kimi_convert.exporters.onnx.options import MatrixRole, MoeForm
from kimi_convert.exporters.onnx.quantization import BLOCK
from kimi_convert.exporters.onnx.weights import PROJECTIONS, StackedExperts

_SMALLEST = float(np.finfo(np.float32).tiny)
_UNCHOSEN = -1e30


class Routing(NamedTuple):
    """The experts of each token and the factors on their outputs."""

    weights: ir.Value  # [N, k] fp32
    experts: ir.Value  # [N, k] int64


def routed_experts(m: ModelBuilder, x: ir.Value, routing: Routing, layer_idx: int) -> ir.Value:
    """Return the weighted sum of the chosen experts' outputs, [N, D]."""
    if m.options.moe_form is MoeForm.ACTIVE:
        return _active_experts(m, x, routing, layer_idx)
    return _fused_experts(m, x, routing, layer_idx)


def _active_experts(m: ModelBuilder, x: ir.Value, routing: Routing, layer_idx: int) -> ir.Value:
    """Loop over the experts that some token chose, each over its tokens alone."""
    stacked = m.store.experts(layer_idx)
    segments = [m.add_initializer(segment) for segment in stacked.segments]
    (chosen,) = m.ops(
        "Unique", m.reshape(routing.experts, -1), attributes={"sorted": 1}, names=("active",)
    )
    start = m.op("Mul", m.widen(x), m.number(0.0))
    always = m.constant(np.array(True), "true")
    body = _one_expert(m, x, routing, chosen, segments, stacked)
    return m.narrow(m.op("Loop", m.op("Size", chosen), always, start, attributes={"body": body}))


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
    if m.dtype is not FLOAT:
        output = b.cast(output, FLOAT)
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
    """Return one expert's matrix [out, in] in the dtype of activations."""
    sizes, width = m.config.moe, m.config.hidden_size
    assert sizes is not None
    rows = stacked.rows[projection]
    table = m.constant(np.array(rows, dtype=np.int64), f"rows.{'_'.join(map(str, rows))}")
    row = b.op("Gather", table, expert, attributes={"axis": 0})
    flat = _row_of_segments(m, b, segments, row)
    if segments[0].dtype is not m.dtype:
        flat = b.cast(flat, m.dtype)
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
    """Run all chosen experts in one node of com.microsoft."""
    sizes = m.config.moe
    assert sizes is not None
    op_type, weights, attributes = _fused_weights(m, layer_idx)
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
        op_type,
        *(m.widen(x), told, *weights),
        attributes={
            "k": sizes.num_experts_per_token,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": 1,
            **attributes,
        },
        domain=MICROSOFT,
        name="routed",
    )
    total = m.op("ReduceSum", routing.weights, m.integers(-1), attributes={"keepdims": 1})
    return m.narrow(m.op("Mul", mixed, total))


def _fused_weights(
    m: ModelBuilder, layer_idx: int
) -> tuple[str, tuple[ir.Value | None, ...], dict[str, int]]:
    """Return the operator, its weights as inputs, and what it must be told of them."""
    bits = m.options.bits(MatrixRole.EXPERT)
    if bits is None:
        stored = (m.add_initializer(t) for t in m.store.fused_experts(layer_idx))
        gate_up, down = (v if v.dtype is FLOAT else m.cast(v, FLOAT) for v in stored)
        return "MoE", (gate_up, None, down), {}
    gate_up, down = m.store.quantized_experts(layer_idx, bits)
    inputs = [
        m.add_initializer(tensor)
        for matrix in (gate_up, down)
        for tensor in (matrix.packed, matrix.scales)
    ]
    attributes = {
        "expert_weight_bits": bits,
        "block_size": BLOCK,
        "accuracy_level": INT8_ACTIVATIONS,
    }
    return "QMoE", (*inputs[:2], None, *inputs[2:]), attributes
