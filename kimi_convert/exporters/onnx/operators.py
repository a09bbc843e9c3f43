"""KDA's two operators as nodes of each target, and the functions that come with them.

target   nodes                                                     functions
ort      com.microsoft::LinearAttention, ::CausalConvWithState     the same names, for old runtimes
onnx27   LinearAttention-27, CausalConvWithState-27                none
custom   ai.kimi::KimiDeltaAttention, ::KimiShortConv              both, portable or nested
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from kimi_convert.exporters.onnx.builder import GraphBuilder
from kimi_convert.exporters.onnx.domains import KIMI, MICROSOFT
from kimi_convert.exporters.onnx.functions import (
    DeltaRuleInputs,
    causal_conv_function,
    delta_attention_function,
    linear_attention_function,
    nested_delta_attention_function,
    nested_short_conv_function,
    short_conv_function,
)
from kimi_convert.exporters.onnx.options import CustomBody, OnnxOptions, Target


class Stateful(NamedTuple):
    """An operator's output, and what the next call continues from."""

    output: ir.Value
    state: ir.Value


class KdaOperators:
    """The nodes that one export writes for KDA, and the functions that come with them."""

    def __init__(self, options: OnnxOptions, *, channels: int, conv_size: int) -> None:
        """Choose the nodes; `channels` and `conv_size` are those of every KDA layer."""
        self._options = options
        self._channels = channels
        self._conv_size = conv_size

    def short_conv(
        self, g: GraphBuilder, x: ir.Value, weight: ir.Value, past: ir.Value
    ) -> Stateful:
        """Convolve x [B, T, C] with weight [C, 1, W], after past [B, C, W - 1]; then SiLU."""
        if self._options.target is Target.CUSTOM:
            attributes = {"activation": "silu", "channels": self._channels}
            return Stateful(
                *g.ops(
                    "KimiShortConv",
                    *(x, weight, past),
                    attributes=attributes,
                    domain=KIMI,
                    names=("convolved", "conv_state"),
                )
            )
        output, state = g.ops(
            "CausalConvWithState",
            *(g.transpose(x, 0, 2, 1), weight, None, past),
            attributes={"activation": "silu"},
            domain=self._domain,
            names=("convolved", "conv_state"),
        )
        return Stateful(g.transpose(output, 0, 2, 1), state)

    def delta_rule(
        self, g: GraphBuilder, x: DeltaRuleInputs, *, num_heads: int, scale: float
    ) -> Stateful:
        """Run the recurrence over the T tokens."""
        if self._options.target is Target.CUSTOM:
            return Stateful(
                *g.ops(
                    "KimiDeltaAttention",
                    *(x.q, x.k, x.v, x.g, x.beta, x.state),
                    attributes={"num_heads": num_heads, "scale": scale},
                    domain=KIMI,
                    names=("mixed", "state"),
                )
            )
        attributes = {
            "q_num_heads": num_heads,
            "kv_num_heads": num_heads,
            "update_rule": "gated_delta",
            "scale": scale,
        }
        return Stateful(
            *g.ops(
                "LinearAttention",
                *(x.q, x.k, x.v, x.state, x.g, x.beta),
                attributes=attributes,
                domain=self._domain,
                names=("mixed", "state"),
            )
        )

    def functions(self) -> tuple[ir.Function, ...]:
        """Return the bodies that the file brings along."""
        opset = self._options.opset
        if self._options.target is Target.ONNX27:
            return ()
        microsoft = (
            linear_attention_function(opset),
            causal_conv_function(opset, channels=self._channels, conv_size=self._conv_size),
        )
        if self._options.target is Target.ORT:
            return microsoft
        if self._options.custom_body is CustomBody.PORTABLE:
            return (delta_attention_function(opset), short_conv_function(opset, self._conv_size))
        nested = (nested_delta_attention_function(opset), nested_short_conv_function(opset))
        return (*microsoft, *nested)  # the reference evaluator reads them in order

    @property
    def _domain(self) -> str:
        return MICROSOFT if self._options.target is Target.ORT else ""
