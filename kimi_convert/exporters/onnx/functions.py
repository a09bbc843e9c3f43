"""Bodies of KDA's two operators as ONNX functions.

    short convolution   y = silu(causal depthwise convolution of x), with the last W - 1 inputs kept
    delta rule          S_t = (I - beta k k^T) diag(exp g) S_{t-1} + beta k v^T,  o = scale S_t^T q

A function is a body for runtimes that have no kernel of the operator's name; a kernel, where there
is one, takes its place. A body is written at the opset of the model, as the checker asks.

In shapes: B batch, T tokens, H heads, K key dim, V value dim, C channels, W convolution width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir

from kimi_convert.exporters.onnx.builder import END, GraphBuilder, reference
from kimi_convert.exporters.onnx.domains import DOMAIN_VERSIONS, KIMI, MICROSOFT

# Doc strings of the functions in a file; docs/formats/onnx.md has the same as tables.
_DELTA_RULE_DOC = """\
Kimi Delta Attention, token by token: S_t = (I - beta k k^T) diag(exp g) S_{t-1} + beta k v^T and
o = scale S_t^T q. Packed heads: q, k, g [B, T, H K], v [B, T, H V], beta [B, T, H]; states [B, H, K, V].
q and k have unit length per head; g is the natural log of the decay per key channel; beta is in (0, 1).
All fp32. Attributes: the number of heads H, and scale."""
_CONV_DOC = """\
SiLU of a causal depthwise convolution of {layout}, weight [C, 1, W], whose tap W - 1 meets the current
token. States [B, C, W - 1] are the last inputs, the oldest first."""

_INT, _FLOAT = ir.AttributeType.INT, ir.AttributeType.FLOAT


class DeltaRuleInputs(NamedTuple):
    """What the delta rule reads, heads packed into the last axis."""

    q: ir.Value  # [B, T, H K], unit length per head
    k: ir.Value  # [B, T, H K], unit length per head
    v: ir.Value  # [B, T, H V]
    state: ir.Value  # [B, H, K, V] fp32
    g: ir.Value  # [B, T, H K], natural log, <= 0
    beta: ir.Value  # [B, T, H], in (0, 1)


def linear_attention_function(opset: int) -> ir.Function:
    """Return com.microsoft::LinearAttention, update rule gated_delta, as a Scan."""

    def body(g: GraphBuilder, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
        q, k, v, state, decay, beta = inputs
        x = DeltaRuleInputs(q, k, v, state, decay, beta)
        return _scan_delta_rule(g, x, num_heads="q_num_heads")

    return _function(
        (MICROSOFT, "LinearAttention"),
        opset,
        body,
        inputs=("query", "key", "value", "past_state", "decay", "beta"),
        outputs=("output", "present_state"),
        attributes={
            "q_num_heads": _INT,
            "kv_num_heads": _INT,
            "update_rule": ir.AttributeType.STRING,
            "scale": _FLOAT,
        },
        doc=_DELTA_RULE_DOC,
    )


def causal_conv_function(opset: int, *, channels: int, conv_size: int) -> ir.Function:
    """Return com.microsoft::CausalConvWithState with SiLU, for one number of channels.

    The operator has no attribute that Conv could take its groups from.
    """

    def body(g: GraphBuilder, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
        x, weight, bias, past = inputs
        seen = g.concat(past, x, axis=-1)  # [B, C, W - 1 + T]
        summed = g.op("Conv", seen, weight, bias, attributes={"group": channels})
        return g.silu(summed), _last(g, seen, conv_size - 1)

    return _function(
        (MICROSOFT, "CausalConvWithState"),
        opset,
        body,
        inputs=("input", "weight", "bias", "past_state"),
        outputs=("output", "present_state"),
        attributes={"activation": ir.AttributeType.STRING},
        doc=_CONV_DOC.format(layout="input [B, C, T]"),
    )


def delta_attention_function(opset: int) -> ir.Function:
    """Return ai.kimi::KimiDeltaAttention, version 1, as a Scan."""

    def body(g: GraphBuilder, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
        q, k, v, decay, beta, state = inputs
        x = DeltaRuleInputs(q, k, v, state, decay, beta)
        return _scan_delta_rule(g, x, num_heads="num_heads")

    return _kimi_delta_attention(opset, body)


def nested_delta_attention_function(opset: int) -> ir.Function:
    """Return ai.kimi::KimiDeltaAttention, version 1, as com.microsoft::LinearAttention."""

    def body(g: GraphBuilder, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
        q, k, v, decay, beta, state = inputs
        return g.ops(
            "LinearAttention",
            *(q, k, v, state, decay, beta),
            attributes={
                "q_num_heads": reference("q_num_heads", "num_heads", _INT),
                "kv_num_heads": reference("kv_num_heads", "num_heads", _INT),
                "update_rule": "gated_delta",
                "scale": reference("scale", "scale", _FLOAT),
            },
            domain=MICROSOFT,
            names=("mixed", "state"),
        )

    return _kimi_delta_attention(opset, body)


def short_conv_function(opset: int, conv_size: int) -> ir.Function:
    """Return ai.kimi::KimiShortConv, version 1, in standard operators."""

    def body(g: GraphBuilder, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
        x, weight, past = inputs
        seen = g.concat(past, g.transpose(x, 0, 2, 1), axis=-1)  # [B, C, W - 1 + T]
        groups = reference("group", "channels", _INT)
        summed = g.op("Conv", seen, weight, attributes={"group": groups})
        return g.transpose(g.silu(summed), 0, 2, 1), _last(g, seen, conv_size - 1)

    return _kimi_short_conv(opset, body)


def nested_short_conv_function(opset: int) -> ir.Function:
    """Return ai.kimi::KimiShortConv, version 1, as com.microsoft::CausalConvWithState."""

    def body(g: GraphBuilder, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
        x, weight, past = inputs
        output, state = g.ops(
            "CausalConvWithState",
            *(g.transpose(x, 0, 2, 1), weight, None, past),
            attributes={
                "activation": reference("activation", "activation", ir.AttributeType.STRING)
            },
            domain=MICROSOFT,
            names=("convolved", "state"),
        )
        return g.transpose(output, 0, 2, 1), state

    return _kimi_short_conv(opset, body)


_Body = Callable[[GraphBuilder, Sequence[ir.Value]], Sequence[ir.Value]]


def _kimi_delta_attention(opset: int, body: _Body) -> ir.Function:
    return _function(
        (KIMI, "KimiDeltaAttention"),
        opset,
        body,
        inputs=("q", "k", "v", "g", "beta", "past_state"),
        outputs=("o", "present_state"),
        attributes={"num_heads": _INT, "scale": _FLOAT},
        doc=_DELTA_RULE_DOC,
    )


def _kimi_short_conv(opset: int, body: _Body) -> ir.Function:
    return _function(
        (KIMI, "KimiShortConv"),
        opset,
        body,
        inputs=("x", "weight", "past_state"),
        outputs=("y", "present_state"),
        attributes={"activation": ir.AttributeType.STRING, "channels": _INT},
        doc=_CONV_DOC.format(layout="x [B, T, C]") + " Attributes: activation (silu) and C.",
    )


def _function(
    identity: tuple[str, str],
    opset: int,
    body: _Body,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Mapping[str, ir.AttributeType],
    doc: str,
) -> ir.Function:
    builder = GraphBuilder(opset=opset, in_function=True)
    given = [ir.Value(name=name) for name in inputs]
    made = body(builder, given)
    for value, name in zip(made, outputs, strict=True):
        value.name = name
    imports = {"": opset} | {
        domain: DOMAIN_VERSIONS[domain] for domain in builder.domains if domain
    }
    graph = ir.Graph(given, made, nodes=builder.nodes, opset_imports=imports)
    declared = [ir.Attr(name, kind, None) for name, kind in attributes.items()]
    function = ir.Function(*identity, graph=graph, attributes=declared)
    function.doc_string = doc
    return function


def _last(g: GraphBuilder, x: ir.Value, count: int) -> ir.Value:
    return g.slice(x, -count or END, END, axis=-1)


def _scan_delta_rule(
    g: GraphBuilder, x: DeltaRuleInputs, *, num_heads: str
) -> tuple[ir.Value, ir.Value]:
    """Return the outputs [B, T, H V] and the last state; `num_heads` names the attribute."""
    heads = g.op("Constant", attributes={"value_int": reference("value_int", num_heads, _INT)})
    scale = g.op("Constant", attributes={"value_float": reference("value_float", "scale", _FLOAT)})
    heads = g.op("Reshape", heads, g.integers(1))
    per_head = g.concat(g.integers(0, 0), heads, g.integers(-1), axis=0)

    def steps(packed: ir.Value) -> ir.Value:  # [B, T, H D] -> [T, B, H, D]
        return g.transpose(g.op("Reshape", packed, per_head), 1, 0, 2, 3)

    scanned = (
        g.op("Mul", steps(x.q), scale),
        steps(x.k),
        steps(x.v),
        g.op("Exp", steps(x.g)),
        g.transpose(x.beta, 1, 0, 2),  # [T, B, H]
    )
    state, mixed = g.ops(
        "Scan",
        x.state,
        *scanned,
        attributes={"body": _delta_rule_step(g.opset), "num_scan_inputs": len(scanned)},
        names=("present", "outputs"),
    )
    return g.reshape(g.transpose(mixed, 1, 0, 2, 3), 0, 0, -1), state


def _delta_rule_step(opset: int) -> ir.Graph:
    """Return one token: decay, correct what k reads towards v, read with q."""
    g = GraphBuilder(opset=opset, in_function=True, prefix="step.")
    names = ("S", "q", "k", "v", "exp_g", "beta")
    state, q, k, v, decay, beta = (g.value(name, ir.DataType.FLOAT) for name in names)

    def column(vector: ir.Value) -> ir.Value:
        return g.op("Unsqueeze", vector, g.integers(-1))

    def row(vector: ir.Value) -> ir.Value:
        return g.op("Unsqueeze", vector, g.integers(-2))

    decayed = g.op("Mul", state, column(decay))  # [B, H, K, V]
    missing = g.op("Sub", row(v), g.op("MatMul", row(k), decayed))  # [B, H, 1, V]
    written = g.op("Mul", column(k), g.op("Mul", missing, column(column(beta))))
    after = g.op("Add", decayed, written, name="S_next")
    read = g.op("Squeeze", g.op("MatMul", row(q), after), g.integers(-2), name="o")
    for value in (after, read):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph(
        (state, q, k, v, decay, beta),
        (after, read),
        nodes=g.nodes,
        name="delta_rule_step",
    )
