"""One KDA layer's mixer as nodes; `kimi_convert.model.kda` has the equations.

Positions that the attention mask leaves out reach the mixer as zeros. Their k is zero, so they write
nothing into the state, and before the first token they leave the convolution's zeros as they are.
"""

from __future__ import annotations

import onnx_ir as ir

from kimi_convert.exporters.onnx.functions import DeltaRuleInputs
from kimi_convert.exporters.onnx.model_builder import (
    BATCH,
    FLOAT,
    ModelBuilder,
    past_name,
    present_name,
)
from kimi_convert.exporters.onnx.operators import KdaOperators
from kimi_convert.exporters.onnx.options import MatrixRole

CONV_STATE, RECURRENT_STATE = "conv_state", "recurrent_state"

# As served: `model.numerics.SERVED` and `model.kda` say the same, and importing them imports torch.
O_NORM_EPS = 1e-5
UNIT_NORM_EPS = 1e-6


def kda_mixer(m: ModelBuilder, operators: KdaOperators, x: ir.Value, layer_idx: int) -> ir.Value:
    """Mix rows x [N, D], normalised and zero where nothing is; return [N, D]."""
    sizes = m.config.kda
    assert sizes is not None
    prefix, heads, width = f"layers.{layer_idx}.kda.", sizes.num_heads, sizes.head_dim
    inner = heads * width  # P
    q, k, v = _convolved(m, operators, x, layer_idx)  # [B, T, P]
    q, k = (_unit(m, y, name) for y, name in ((q, "q_unit"), (k, "k_unit")))
    beta_logits = m.linear(x, prefix + "b.weight", role=MatrixRole.SENSITIVE, name="beta_logits")
    beta = m.op("Sigmoid", m.widen(beta_logits), name="beta")
    shape = (BATCH, heads, width, width)
    past = m.state_input(past_name(layer_idx, RECURRENT_STATE), shape, FLOAT)
    inputs = DeltaRuleInputs(
        q=q,
        k=k,
        v=m.widen(v),
        state=past,
        g=m.per_token(_log_decay(m, x, prefix), inner),
        beta=m.per_token(beta, heads),
    )
    mixed, state = operators.delta_rule(m, inputs, num_heads=heads, scale=width**-0.5)
    m.keep_state(past, state, present_name(layer_idx, RECURRENT_STATE), shape)
    return _output(m, x, mixed, prefix)


def _convolved(
    m: ModelBuilder, operators: KdaOperators, x: ir.Value, layer_idx: int
) -> tuple[ir.Value, ...]:
    """Return q, k and v [B, T, P] after one convolution over the channels of all three."""
    sizes = m.config.kda
    assert sizes is not None
    prefix, inner = f"layers.{layer_idx}.kda.", sizes.num_heads * sizes.head_dim
    projected = [m.linear(x, f"{prefix}{part}.weight", name=part) for part in "qkv"]
    taps = [m.weight(f"{prefix}{part}_conv.weight") for part in "qkv"]  # [P, 1, W]
    qkv = m.per_token(m.concat(*projected, axis=-1, name="qkv"), 3 * inner)
    shape = (BATCH, 3 * inner, sizes.conv_size - 1)
    past = m.state_input(past_name(layer_idx, CONV_STATE), shape, m.dtype)
    convolved, state = operators.short_conv(m, qkv, m.concat(*taps, axis=0, name="taps"), past)
    m.keep_state(past, state, present_name(layer_idx, CONV_STATE), shape)
    return m.split(convolved, (inner, inner, inner))


def _unit(m: ModelBuilder, y: ir.Value, name: str) -> ir.Value:
    """Return y [B, T, P] with every head at unit length, in fp32."""
    sizes = m.config.kda
    assert sizes is not None
    heads = m.widen(m.reshape(y, 0, 0, sizes.num_heads, sizes.head_dim))
    unit = m.unit_norm(heads, width=sizes.head_dim, eps=UNIT_NORM_EPS, name=name)
    return m.reshape(unit, 0, 0, sizes.num_heads * sizes.head_dim)


def _log_decay(m: ModelBuilder, x: ir.Value, prefix: str) -> ir.Value:
    """Return g = -exp(A_log) softplus(f + dt_bias), [N, P]."""
    sizes = m.config.kda
    assert sizes is not None
    f = m.linear(
        m.linear(x, prefix + "f_a.weight", role=MatrixRole.SENSITIVE),
        prefix + "f_b.weight",
        role=MatrixRole.SENSITIVE,
        name="g_raw",
    )
    biased = m.op("Add", m.widen(f), m.wide_weight(prefix + "dt_bias"))
    rate = m.op("Neg", m.op("Exp", m.wide_weight(prefix + "A_log")))  # [1, 1, H, 1]
    per_channel = m.op("Expand", rate, m.integers(1, 1, sizes.num_heads, sizes.head_dim))
    return m.op("Mul", m.op("Softplus", biased), m.reshape(per_channel, -1), name="g")


def _output(m: ModelBuilder, x: ir.Value, mixed: ir.Value, prefix: str) -> ir.Value:
    """Return W_o (norm(o) sigmoid(output gate)) of mixed [B, T, P], as rows [N, D]."""
    sizes = m.config.kda
    assert sizes is not None
    heads, width = sizes.num_heads, sizes.head_dim
    normed = m.wide_norm(
        m.reshape(mixed, 0, 0, heads, width),
        m.wide_weight(prefix + "o_norm.weight"),
        eps=O_NORM_EPS,
        name="mixed_normed",
    )
    gate = m.linear(
        m.linear(x, prefix + "g_a.weight", role=MatrixRole.SENSITIVE),
        prefix + "g_b.weight",
        role=MatrixRole.SENSITIVE,
        name="output_gate",
    )
    opened = m.op("Sigmoid", m.widen(gate))
    gated = m.op("Mul", m.reshape(normed, -1, heads * width), opened)
    output = prefix + "o.weight"
    return m.linear(m.narrow(gated), output, role=MatrixRole.SENSITIVE, name="kda_output")
