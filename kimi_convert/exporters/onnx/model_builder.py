"""What the layers of an exported model share: weights, products, norms, inputs, states.

Between mixers the activations are rows [N, D] of the N = B T tokens of a call, so that every product
with a matrix is a Gemm whose weight is stored as checkpoints store it, [out, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.exporters.onnx.builder import END, GraphBuilder
from kimi_convert.exporters.onnx.domains import MICROSOFT
from kimi_convert.exporters.onnx.options import MatrixRole, OnnxOptions, Precision
from kimi_convert.exporters.onnx.quantization import BLOCK
from kimi_convert.exporters.onnx.weights import WeightStore

FLOAT = ir.DataType.FLOAT
INT8_ACTIVATIONS = 4  # accuracy level of MatMulNBits: the only fast one for 8 bits
_RMS_NORM_OPSET = 23  # the first with RMSNormalization

BATCH, SEQUENCE, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)


@dataclass(frozen=True, slots=True)
class StatePair:
    """A state as the graph takes it and as it gives it back."""

    past: ir.Value
    present: ir.Value


class ModelBuilder(GraphBuilder):
    """Builds the graph of one model; layers append to it."""

    def __init__(self, config: ModelConfig, options: OnnxOptions, store: WeightStore) -> None:
        """Make the inputs that every model has."""
        super().__init__(opset=options.opset)
        self.config = config
        self.options = options
        half = options.precision is Precision.FP16
        self.dtype = ir.DataType.FLOAT16 if half else FLOAT  # of activations
        self.store = store
        self.states: list[StatePair] = []
        self.input_ids = _input("input_ids", ir.DataType.INT64, (BATCH, SEQUENCE))
        self.attention_mask = _input("attention_mask", ir.DataType.INT64, (BATCH, TOTAL))
        self._weights: dict[str, ir.Value] = {}
        self._shapes: dict[int, ir.Value] = {}
        with self.scope("tokens"):
            self._batch_tokens = self.op("Shape", self.input_ids, name="batch_and_tokens")

    def weight(self, param: str) -> ir.Value:
        """Return a parameter in the dtype of activations, whatever it is stored in."""
        return self._as(param, self.stored(param), self.dtype)

    def wide_weight(self, param: str) -> ir.Value:
        """Return a parameter in fp32, of which nothing was lost on the way."""
        if param not in self._weights:
            self._weights[param] = self.add_initializer(self.store.tensor(param, wide=True))
        return self._as(param, self._weights[param], FLOAT)

    def stored(self, param: str) -> ir.Value:
        """Return a parameter as it is stored."""
        if param not in self._weights:
            self._weights[param] = self.add_initializer(self.store.tensor(param))
        return self._weights[param]

    def _as(self, param: str, stored: ir.Value, dtype: ir.DataType) -> ir.Value:
        if stored.dtype is dtype:
            return stored
        name = f"{param} as {dtype.name}"
        if name not in self._weights:
            self._weights[name] = self.cast(stored, dtype)
        return self._weights[name]

    def widen(self, x: ir.Value) -> ir.Value:
        """Return an activation in fp32."""
        return x if self.dtype is FLOAT else self.cast(x, FLOAT)

    def narrow(self, x: ir.Value) -> ir.Value:
        """Return what was computed in fp32 in the dtype of activations."""
        return x if self.dtype is FLOAT else self.cast(x, self.dtype)

    def linear(
        self,
        x: ir.Value,
        param: str,
        *,
        role: MatrixRole = MatrixRole.LARGE,
        name: str | None = None,
    ) -> ir.Value:
        """Return x [N, in] times the transpose of a weight [out, in]."""
        bits = self.options.bits(role)
        if bits is None:
            weight = self.weight(param)
            return self.op("Gemm", x, weight, attributes={"transB": 1}, name=name)
        matrix = self.store.quantized(param, bits)
        attributes = {
            "N": matrix.rows,
            "K": matrix.width,
            "bits": bits,
            "block_size": BLOCK,
            "accuracy_level": INT8_ACTIVATIONS,
        }
        packed, scales = self.add_initializer(matrix.packed), self.add_initializer(matrix.scales)
        return self.op(
            *("MatMulNBits", x, packed, scales), attributes=attributes, domain=MICROSOFT, name=name
        )

    def embedded(self, ids: ir.Value) -> ir.Value:
        """Return the embeddings of ids [N] as rows [N, D]."""
        bits = self.options.bits(MatrixRole.EMBEDDING)
        if bits is None:
            stored = self.stored("embed.weight")
            rows = self.op("Gather", stored, ids, name="embedded")
            return rows if stored.dtype is self.dtype else self.cast(rows, self.dtype)
        table = self.store.quantized_table("embed.weight", bits)
        packed, scales = self.add_initializer(table.packed), self.add_initializer(table.scales)
        return self.op(
            *("GatherBlockQuantized", packed, ids, scales),
            attributes={"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1},
            domain=MICROSOFT,
            name="embedded",
        )

    def rms_norm(self, x: ir.Value, param: str, *, eps: float) -> ir.Value:
        """Return x / sqrt(mean x^2 + eps), rounded, times a weight, over the last axis."""
        weight = self.weight(param)
        if self.dtype is FLOAT:
            return self.wide_norm(x, weight, eps=eps)
        assert weight.shape is not None
        # As long as the axis: ONNX Runtime 1.20 fuses a shorter one and then fails.
        width = int(np.prod(weight.shape.numpy()))
        ones = self.constant(np.ones(width, dtype=np.float32), f"ones.{width}")
        return self.op("Mul", self.narrow(self.wide_norm(self.widen(x), ones, eps=eps)), weight)

    def wide_norm(
        self, x: ir.Value, weight: ir.Value, *, eps: float, name: str = "normed"
    ) -> ir.Value:
        """Return x / sqrt(mean x^2 + eps) times weight, over the last axis, all fp32."""
        if self.opset >= _RMS_NORM_OPSET:
            attributes = {"axis": -1, "epsilon": eps}
            return self.op("RMSNormalization", x, weight, attributes=attributes, name=name)
        # ONNX Runtime fuses exactly these six into one kernel.
        squares = self.op("Pow", x, self.number(2.0))
        mean = self.op("ReduceMean", squares, self.integers(-1), attributes={"keepdims": 1})
        root = self.op("Sqrt", self.op("Add", mean, self.number(eps)))
        return self.op("Mul", self.op("Div", x, root), weight, name=name)

    def unit_norm(self, x: ir.Value, *, width: int, eps: float, name: str) -> ir.Value:
        """Return x / sqrt(sum x^2 + eps) over the last axis, which has `width` elements, in fp32."""
        factor = np.full(width, width**-0.5, dtype=np.float32)
        weight = self.constant(factor, f"unit_norm.{width}")
        return self.wide_norm(x, weight, eps=eps / width, name=name)

    def per_token(self, x: ir.Value, width: int) -> ir.Value:
        """Return rows [N, width] as [B, T, width]."""
        shape = self._shapes.get(width)
        if shape is None:
            shape = self.concat(self._batch_tokens, self.integers(width), axis=0)
            self._shapes[width] = shape
        return self.op("Reshape", x, shape)

    def num_tokens(self) -> ir.Value:
        """Return T as a vector of one."""
        return self.slice(self._batch_tokens, 1, 2, axis=0)

    def last_tokens(self, per_position: ir.Value) -> ir.Value:
        """Return the last T columns of [B, S]: those of the tokens of this call."""
        start = self.op("Neg", self.num_tokens())
        return self.op("Slice", per_position, start, self.integers(END), self.integers(1))

    def state_input(
        self, name: str, shape: Sequence[int | str], dtype: ir.DataType = FLOAT
    ) -> ir.Value:
        """Make the input of a state; `keep_state` says what it becomes."""
        return _input(name, dtype, shape)

    def keep_state(
        self, past: ir.Value, present: ir.Value, name: str, shape: Sequence[int | str]
    ) -> None:
        """Give a state back under the name that the next call's input belongs to."""
        present.name = name
        present.shape = ir.Shape(shape)
        present.type = past.type
        self.states.append(StatePair(past, present))


def past_name(layer_idx: int | str, part: str) -> str:
    """Return the input of a layer's state; onnxruntime-genai finds states by these names."""
    return f"past_key_values.{layer_idx}.{part}"


def present_name(layer_idx: int | str, part: str) -> str:
    """Return the output of a layer's state."""
    return f"present.{layer_idx}.{part}"


def _input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
