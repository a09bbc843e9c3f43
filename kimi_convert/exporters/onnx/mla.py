"""One MLA layer's mixer as nodes; `kimi_convert.model.mla` has the equations.

Materialised, a layer keeps keys and values of every head, both padded to one width, as
onnxruntime-genai asks for. Latent, it keeps R + r numbers per token, and W_kvb moves to the query and
to the output.

In shapes: H heads, R latent, n nope, r rope, S tokens seen, T tokens of this call.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from kimi_convert.config.architecture import MlaConfig, RopeConfig
from kimi_convert.exporters.onnx.model_builder import (
    BATCH,
    PAST,
    TOTAL,
    ModelBuilder,
    past_name,
    present_name,
)
from kimi_convert.exporters.onnx.options import MatrixRole, MlaForm

KEY, VALUE, LATENT = "key", "value", "latent"

# Far below every score, and finite: a row that may see nothing stays free of NaN.
_NEVER = -1e30


class Rotation(NamedTuple):
    """Cosine and sine of the tokens' angles, each [B, 1, T, r/2]."""

    cos: ir.Value
    sin: ir.Value


class AttentionContext(NamedTuple):
    """What all MLA layers of a graph share."""

    bias: ir.Value  # [B, 1, T, S], 0 where a query may look
    rotation: Rotation | None


def attention_context(m: ModelBuilder) -> AttentionContext:
    """Make the mask of all MLA layers, and their rotation if they rotate."""
    with m.scope("mask"):
        tokens = m.op("Squeeze", m.num_tokens())
        total = m.op("Squeeze", m.slice(m.op("Shape", m.attention_mask), 1, 2, axis=0))
        first = m.op("Sub", total, tokens)
        one = m.integer(1)
        rows = m.op("Unsqueeze", m.op("Range", first, total, one), m.integers(1))  # [T, 1]
        columns = m.op("Range", m.integer(0), total, one)  # [S]
        present = m.op("Unsqueeze", m.cast(m.attention_mask, ir.DataType.BOOL), m.integers(1, 2))
        visible = m.op("And", m.op("LessOrEqual", columns, rows), present)
        bias = m.op("Where", visible, m.number(0.0), m.number(_NEVER), name="bias")
    rope = m.config.mla.rope
    return AttentionContext(bias, None if rope is None else _rotation(m, rope))


def mla_mixer(m: ModelBuilder, context: AttentionContext, x: ir.Value, layer_idx: int) -> ir.Value:
    """Mix rows x [N, D], normalised; return [N, D]."""
    sizes = m.config.mla
    prefix = f"layers.{layer_idx}.mla."
    q = _queries(m, x, prefix, context.rotation)  # [B, H, T, n + r]
    latent, rope_key = _latents(m, x, prefix, context.rotation)
    form = _FORMS[m.options.mla]
    mixed = form(m, context.bias, q, latent, rope_key, layer_idx)  # [B, H, T, V]
    rows = m.reshape(m.transpose(mixed, 0, 2, 1, 3), -1, sizes.num_heads * sizes.v_head_dim)
    return m.linear(rows, prefix + "o.weight", name="mla_output")


def _rotation(m: ModelBuilder, rope: RopeConfig) -> Rotation:
    """Return the rotation at every token's place among the tokens that are not padding."""
    from kimi_convert.model.rope import rope_frequencies  # imports torch

    with m.scope("rope"):
        counted = m.op("CumSum", m.attention_mask, m.integer(1))
        place = m.op("Sub", m.last_tokens(counted), m.integer(1))  # [B, T]
        place = m.cast(m.op("Max", place, m.integer(0)), ir.DataType.FLOAT)
        frequencies = rope_frequencies(rope, dim=m.config.mla.qk_rope_head_dim).numpy()
        angles = m.op(
            "Mul",
            m.op("Unsqueeze", place, m.integers(1, 3)),  # [B, 1, T, 1]
            m.constant(frequencies, "rope.frequencies"),
        )
        factor = m.number(rope.yarn.rotation_factor if rope.yarn else 1.0)
        cos = m.op("Mul", m.op("Cos", angles), factor, name="cos")
        sin = m.op("Mul", m.op("Sin", angles), factor, name="sin")
    return Rotation(cos, sin)


def _queries(m: ModelBuilder, x: ir.Value, prefix: str, rotation: Rotation | None) -> ir.Value:
    sizes = m.config.mla
    if sizes.q_lora_rank is None:
        q = m.linear(x, prefix + "q.weight", name="q")
    else:
        low = _latent_norm(m, m.linear(x, prefix + "q_a.weight"), prefix + "q_a_norm.weight")
        q = m.linear(low, prefix + "q_b.weight", name="q")
    q = _heads(m, q, sizes, sizes.qk_head_dim)
    if rotation is None or not sizes.qk_rope_head_dim:
        return q
    nope, rope = m.split(q, (sizes.qk_nope_head_dim, sizes.qk_rope_head_dim))
    return m.concat(nope, _rotate(m, rope, rotation), axis=-1)


def _latents(
    m: ModelBuilder, x: ir.Value, prefix: str, rotation: Rotation | None
) -> tuple[ir.Value, ir.Value | None]:
    """Return the normed latents [N, R], and the shared rope keys [B, 1, T, r] if there are any."""
    sizes = m.config.mla
    rank, rope_dim = sizes.kv_lora_rank, sizes.qk_rope_head_dim
    compressed = m.linear(x, prefix + "kv_a.weight", role=MatrixRole.SENSITIVE, name="kv_a")
    norm = prefix + "kv_a_norm.weight"
    if not rope_dim:
        return _latent_norm(m, compressed, norm), None
    latent, rope_key = m.split(compressed, (rank, rope_dim))
    rope_key = m.op("Unsqueeze", m.per_token(rope_key, rope_dim), m.integers(1))
    if rotation is not None:
        rope_key = _rotate(m, rope_key, rotation)
    return _latent_norm(m, latent, norm), rope_key


def _latent_norm(m: ModelBuilder, x: ir.Value, weight: str) -> ir.Value:
    return m.rms_norm(x, weight, eps=m.config.rms_norm_eps)


def _rotate(m: ModelBuilder, x: ir.Value, rotation: Rotation) -> ir.Value:
    """Rotate pairs of the last axis of x [B, H, T, r]; the order of the dims stays."""
    rope, half = m.config.mla.rope, m.config.mla.qk_rope_head_dim // 2
    assert rope is not None
    if rope.interleaved:
        pairs, axis = m.reshape(x, 0, 0, 0, half, 2), 4
    else:
        pairs, axis = m.reshape(x, 0, 0, 0, 2, half), 3
    first, second = (
        m.op("Squeeze", part, m.integers(axis)) for part in m.split(pairs, (1, 1), axis=axis)
    )
    cos, sin = rotation
    first, second = m.widen(first), m.widen(second)
    turned = (
        m.op("Sub", m.op("Mul", first, cos), m.op("Mul", second, sin)),
        m.op("Add", m.op("Mul", second, cos), m.op("Mul", first, sin)),
    )
    stacked = m.concat(*(m.op("Unsqueeze", y, m.integers(axis)) for y in turned), axis=axis)
    return m.narrow(m.reshape(stacked, 0, 0, 0, 2 * half))


def _materialised(
    m: ModelBuilder,
    bias: ir.Value,
    q: ir.Value,
    latent: ir.Value,
    rope_key: ir.Value | None,
    layer_idx: int,
) -> ir.Value:
    """Attend to the keys and values of every head."""
    sizes = m.config.mla
    kv_b = f"layers.{layer_idx}.mla.kv_b.weight"
    expanded = m.linear(latent, kv_b, role=MatrixRole.SENSITIVE, name="kv_b")
    expanded = _heads(m, expanded, sizes, sizes.qk_nope_head_dim + sizes.v_head_dim)
    k, v = m.split(expanded, (sizes.qk_nope_head_dim, sizes.v_head_dim))  # [B, H, T, n | V]
    if rope_key is not None:
        shape = m.integers(1, sizes.num_heads, 1, sizes.qk_rope_head_dim)
        k = m.concat(k, m.op("Expand", rope_key, shape), axis=-1)
    width = kept_width(sizes)
    keys = _append(m, _pad(m, k, width - sizes.qk_head_dim), layer_idx, KEY, sizes.num_heads)
    values = _append(m, _pad(m, v, width - sizes.v_head_dim), layer_idx, VALUE, sizes.num_heads)
    q = _pad(m, q, width - sizes.qk_head_dim)
    mixed = m.op("MatMul", _weights(m, q, keys, bias), values)
    return mixed if width == sizes.v_head_dim else m.slice(mixed, 0, sizes.v_head_dim, axis=-1)


def _latent(
    m: ModelBuilder,
    bias: ir.Value,
    q: ir.Value,
    latent: ir.Value,
    rope_key: ir.Value | None,
    layer_idx: int,
) -> ir.Value:
    """Attend to the latents themselves: q . (W_k c) = (W_k^T q) . c."""
    sizes = m.config.mla
    nope, rope_dim, rank = sizes.qk_nope_head_dim, sizes.qk_rope_head_dim, sizes.kv_lora_rank
    weight = m.weight(f"layers.{layer_idx}.mla.kv_b.weight")
    per_head = m.reshape(weight, sizes.num_heads, nope + sizes.v_head_dim, rank)
    w_k, w_v = m.split(per_head, (nope, sizes.v_head_dim), axis=1)
    rows = m.op("Unsqueeze", m.per_token(latent, rank), m.integers(1))  # [B, 1, T, R]
    if rope_key is None:
        q = m.op("MatMul", q, w_k)
    else:
        q_nope, q_rope = m.split(q, (nope, rope_dim))
        q = m.concat(m.op("MatMul", q_nope, w_k), q_rope, axis=-1)  # [B, H, T, R + r]
        rows = m.concat(rows, rope_key, axis=-1)
    seen = _append(m, rows, layer_idx, LATENT, 1)  # [B, 1, S, R + r]
    mixed = m.op("MatMul", _weights(m, q, seen, bias), m.slice(seen, 0, rank, axis=-1))
    return m.op("MatMul", mixed, m.transpose(w_v, 0, 2, 1))


_FORMS = {MlaForm.MATERIALISED: _materialised, MlaForm.LATENT: _latent}


def kept_width(sizes: MlaConfig) -> int:
    """Return the width of a head's key and value in the materialised cache."""
    return max(sizes.qk_head_dim, sizes.v_head_dim)


def _weights(m: ModelBuilder, q: ir.Value, keys: ir.Value, bias: ir.Value) -> ir.Value:
    """Return softmax(scale q k^T + bias) [B, H, T, S]."""
    scale = np.float32(m.config.mla.softmax_scale).item()
    scaled = m.op("Mul", q, m.number(scale, m.dtype))
    scores = m.widen(m.op("MatMul", scaled, m.transpose(keys, 0, 1, 3, 2)))
    return m.narrow(m.op("Softmax", m.op("Add", scores, bias), attributes={"axis": -1}))


def _append(m: ModelBuilder, rows: ir.Value, layer_idx: int, part: str, heads: int) -> ir.Value:
    """Return what was kept with rows [B, heads, T, width] behind it."""
    sizes = m.config.mla
    latent_width = sizes.kv_lora_rank + sizes.qk_rope_head_dim
    width = latent_width if part == LATENT else kept_width(sizes)
    past = m.state_input(past_name(layer_idx, part), (BATCH, heads, PAST, width), m.dtype)
    present = m.concat(past, rows, axis=2)
    name = present_name(layer_idx, part)
    m.keep_state(past, present, name, (BATCH, heads, TOTAL, width))
    return present


def _heads(m: ModelBuilder, rows: ir.Value, sizes: MlaConfig, width: int) -> ir.Value:
    """Return rows [N, H width] as [B, H, T, width]."""
    per_token = m.per_token(rows, sizes.num_heads * width)
    return m.transpose(m.reshape(per_token, 0, 0, sizes.num_heads, width), 0, 2, 1, 3)


def _pad(m: ModelBuilder, x: ir.Value, missing: int) -> ir.Value:
    if not missing:
        return x
    return m.op("Pad", x, m.integers(0, 0, 0, 0, 0, 0, 0, missing))
