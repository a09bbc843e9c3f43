"""The graph of a whole model: embedding, decoder layers, final norm, head, and its states.

Built from config.json and the naming tables alone, at any size: no weight is read. One graph is
prefill, prefill in pieces and decode. Its inputs are `input_ids` [B, T], `attention_mask` [B, S] over
the S tokens seen, these included, 0 for padding on the left, and the states; its outputs `logits`
[B, T, vocab] fp32, or [B, 1, vocab] of the last position, and the states after the call.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx.helper import find_min_ir_version_for

from kimi_convert import __version__
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.exporters.onnx.domains import DOMAIN_VERSIONS
from kimi_convert.exporters.onnx.feed_forward import feed_forward
from kimi_convert.exporters.onnx.kda import kda_mixer
from kimi_convert.exporters.onnx.mla import AttentionContext, attention_context, mla_mixer
from kimi_convert.exporters.onnx.model_builder import BATCH, FLOAT, SEQUENCE, ModelBuilder
from kimi_convert.exporters.onnx.operators import KdaOperators
from kimi_convert.exporters.onnx.options import MatrixRole, OnnxOptions
from kimi_convert.exporters.onnx.weights import WeightStore

LOGITS = "logits"

_DOC = """\
A language model with states. input_ids [B, T] are the new tokens; attention_mask [B, S] covers all S tokens
seen, these included, 0 for padding on the left. Start with zeros in conv_state, recurrent_state, and no rows
in key, value and latent; give each present.N.x as past_key_values.N.x of the next call."""


def build_model(config: ModelConfig, options: OnnxOptions, store: WeightStore) -> ir.Model:
    """Return the model; its weights are where `store` says."""
    m = ModelBuilder(config, options, store)
    kda = config.kda
    operators = None
    if kda is not None:
        channels = 3 * kda.num_heads * kda.head_dim
        operators = KdaOperators(options, channels=channels, conv_size=kda.conv_size)
    logits = _logits(m, _decoder(m, operators))
    functions = operators.functions() if operators else ()
    used = m.domains | {domain for f in functions for domain in (f.domain, *f.opset_imports)}
    graph = ir.Graph(
        (m.input_ids, m.attention_mask, *(state.past for state in m.states)),
        (logits, *(state.present for state in m.states)),
        nodes=m.nodes,
        initializers=tuple(m.initializers.values()),
        opset_imports={"": options.opset}
        | {domain: DOMAIN_VERSIONS[domain] for domain in sorted(used) if domain},
        name=config.model_type,
    )
    return ir.Model(
        graph,
        ir_version=_ir_version(options.opset),
        producer_name="kimi-convert",
        producer_version=__version__,
        doc_string=_DOC,
        functions=functions,
    )


def _ir_version(opset: int) -> int:
    """Return the oldest that allows the opset: older runtimes refuse a newer one."""
    return find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def _decoder(m: ModelBuilder, operators: KdaOperators | None) -> ir.Value:
    """Return rows [N, D] after the last layer."""
    eps = m.config.rms_norm_eps
    rows = m.reshape(m.input_ids, -1)
    hidden = m.embedded(rows)
    present = _token_mask(m) if operators else None
    context = attention_context(m) if m.config.mla_layers else None
    for layer_idx in range(m.config.num_layers):
        prefix = f"layers.{layer_idx}."
        with m.scope(f"layers.{layer_idx}"):
            x = m.rms_norm(hidden, prefix + "input_norm.weight", eps=eps)
            hidden = m.op("Add", hidden, _mix(m, operators, context, present, x, layer_idx))
            x = m.rms_norm(hidden, prefix + "mlp_norm.weight", eps=eps)
            hidden = m.op("Add", hidden, feed_forward(m, x, layer_idx), name="hidden")
    return hidden


def _mix(
    m: ModelBuilder,
    operators: KdaOperators | None,
    context: AttentionContext | None,
    present: ir.Value | None,
    x: ir.Value,
    layer_idx: int,
) -> ir.Value:
    if layer_idx in m.config.kda_layers:
        assert operators is not None
        assert present is not None
        with m.scope("kda"):
            return kda_mixer(m, operators, m.op("Mul", x, present, name="x"), layer_idx)
    assert context is not None
    with m.scope("mla"):
        return mla_mixer(m, context, x, layer_idx)


def _token_mask(m: ModelBuilder) -> ir.Value:
    """Return [N, 1]: 1 for tokens, 0 for padding."""
    with m.scope("tokens"):
        mask = m.cast(m.last_tokens(m.attention_mask), m.dtype)
        return m.op("Reshape", mask, m.integers(-1, 1), name="is_token")


def _logits(m: ModelBuilder, hidden: ir.Value) -> ir.Value:
    config = m.config
    sequence: int | str = SEQUENCE
    if m.options.last_logits:
        per_token = m.per_token(hidden, config.hidden_size)
        hidden = m.op("Gather", per_token, m.integer(-1), attributes={"axis": 1})
        sequence = 1
    normed = m.rms_norm(hidden, "norm.weight", eps=config.rms_norm_eps)
    head = "embed.weight" if config.tie_word_embeddings else "head.weight"
    rows = m.widen(m.linear(normed, head, role=MatrixRole.HEAD, name="logits_of_rows"))
    if m.options.last_logits:
        logits = m.op("Unsqueeze", rows, m.integers(1))
    else:
        logits = m.per_token(rows, config.vocab_size)
    logits.name = LOGITS
    logits.type = ir.TensorType(FLOAT)
    logits.shape = ir.Shape((BATCH, sequence, config.vocab_size))
    return logits
