"""Weights of a graph in one file of their own, planned while the graph is built and written afterwards.

Tensors are written in the order in which they were asked for, one in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from kimi_convert.checkpoints.dtypes import DTYPES
from kimi_convert.checkpoints.index import CheckpointIndex
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.exporters.onnx.quantization import BLOCK, num_blocks
from kimi_convert.exporters.onnx.weight_bytes import converted, interleaved_rows, quantized_rows
from kimi_convert.exporters.onnx.weights import (
    PROJECTIONS,
    QuantizedMatrix,
    StackedExperts,
    expert_param,
    external_tensor,
    rows_by_projection,
)

DATA_FILE = "model.onnx.data"

# Large tensors begin on a page, so that they can be mapped; small ones on a cache line.
_PAGE_BYTES, _LINE_BYTES, _LARGE_BYTES = 4096, 64, 1 << 20


@dataclass(frozen=True, slots=True)
class PlannedBytes:
    """A part of the file of weights: where it begins, and what gives its bytes."""

    start: int
    nbytes: int
    name: str
    source_bytes: int  # read for it
    chunks: Callable[[CheckpointReader], Iterator[memoryview]]


class CopiedWeights:
    """Tensors in one file that is written after the graph is built."""

    def __init__(
        self,
        index: CheckpointIndex,
        stored_names: Mapping[str, str],
        config: ModelConfig,
        *,
        dtype: str,
    ) -> None:
        """Plan no tensor yet; `dtype` is the safetensors name of what weights become."""
        self._index = index
        self._stored_names = stored_names
        self._config = config
        self._dtype = dtype
        self.planned: list[PlannedBytes] = []
        self.nbytes = 0

    def tensor(self, param: str, *, wide: bool = False) -> ir.ExternalTensor:
        """Return the tensor of a parameter, in the dtype that weights become, or in fp32."""
        spec = self._spec(param)
        return self.add(spec.name, "F32" if wide else self._dtype, spec.shape, (param,))

    def experts(self, layer_idx: int) -> StackedExperts:
        """Return the experts of a layer, in the order of projections, then experts."""
        sizes = self._config.moe
        assert sizes is not None
        count = sizes.num_experts
        keys = [(projection, expert) for projection in PROJECTIONS for expert in range(count)]
        params = [expert_param(layer_idx, expert, projection) for projection, expert in keys]
        shape = (len(keys), sizes.intermediate_size * self._config.hidden_size)
        stacked = self.add(f"layers.{layer_idx}.experts", self._dtype, shape, params)
        rows = {key: row for row, key in enumerate(keys)}
        return StackedExperts((stacked,), rows_by_projection(rows, count))

    def fused_experts(self, layer_idx: int) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """Return gate and up, their rows interleaved one expert at a time, and down."""
        sizes, width = self._config.moe, self._config.hidden_size
        assert sizes is not None
        count, hidden, dtype = sizes.num_experts, sizes.intermediate_size, self._dtype
        specs = {
            projection: [
                self._spec(expert_param(layer_idx, expert, projection)) for expert in range(count)
            ]
            for projection in PROJECTIONS
        }

        def interleaved(reader: CheckpointReader) -> Iterator[memoryview]:
            for gate, up in zip(specs["gate"], specs["up"], strict=True):
                yield from interleaved_rows(reader, gate, up, dtype)

        source_bytes = sum(spec.nbytes for part in ("gate", "up") for spec in specs[part])
        name = f"layers.{layer_idx}.experts."
        gate_up = self.add_bytes(
            name + "gate_up", dtype, (count, 2 * hidden, width), interleaved, source_bytes
        )
        params = [expert_param(layer_idx, expert, "down") for expert in range(count)]
        return gate_up, self.add(name + "down", dtype, (count, width, hidden), params)

    def quantized(self, param: str, bits: int) -> QuantizedMatrix:
        """Return a matrix as MatMulNBits reads it: blocks apart."""
        rows, width = self._spec(param).shape
        shape = (rows, num_blocks(width), BLOCK * bits // 8)
        return self._add_quantized(self._spec(param).name, [(self._spec(param),)], bits, shape)

    def quantized_table(self, param: str, bits: int) -> QuantizedMatrix:
        """Return a matrix as GatherBlockQuantized reads it: rows whole."""
        rows, width = self._spec(param).shape
        shape = (rows, num_blocks(width) * BLOCK * bits // 8)
        name = f"{self._spec(param).name}.table"
        return self._add_quantized(name, [(self._spec(param),)], bits, shape)

    def quantized_experts(
        self, layer_idx: int, bits: int
    ) -> tuple[QuantizedMatrix, QuantizedMatrix]:
        """Return gate and up, their rows interleaved, and down, as QMoE reads them."""
        sizes, width = self._config.moe, self._config.hidden_size
        assert sizes is not None
        experts, hidden = range(sizes.num_experts), sizes.intermediate_size

        def spec(projection: str, expert: int) -> TensorSpec:
            return self._spec(expert_param(layer_idx, expert, projection))

        name = f"layers.{layer_idx}.experts."
        gate_up = self._add_quantized(
            name + "gate_up",
            [(spec("gate", expert), spec("up", expert)) for expert in experts],
            bits,
            (len(experts), 2 * hidden, width * bits // 8),
        )
        down = self._add_quantized(
            name + "down",
            [(spec("down", expert),) for expert in experts],
            bits,
            (len(experts), width, hidden * bits // 8),
        )
        return gate_up, down

    def _add_quantized(
        self,
        name: str,
        sources: Sequence[Sequence[TensorSpec]],
        bits: int,
        shape: Sequence[int],
    ) -> QuantizedMatrix:
        """Plan integers, then their scales, which are kept while the integers are written."""
        rows, width = sources[0][0].shape
        rows *= len(sources[0])
        kept: list[np.ndarray] = []

        def integers(reader: CheckpointReader) -> Iterator[memoryview]:
            # At once: small arrays that stay between large ones that go would take the heap apart.
            all_scales = np.empty((rows * len(sources), num_blocks(width)), dtype=np.float32)
            kept.append(all_scales)
            at = 0
            for specs in sources:
                for part in quantized_rows(reader, specs, bits):
                    all_scales[at : at + len(part.scales)] = part.scales
                    at += len(part.scales)
                    yield np.ascontiguousarray(part.packed).reshape(-1).data

        def scales(reader: CheckpointReader) -> Iterator[memoryview]:
            yield kept.pop().reshape(-1).view(np.uint8).data

        source_bytes = sum(spec.nbytes for specs in sources for spec in specs)
        packed = self.add_bytes(f"{name}.int{bits}", "U8", shape, integers, source_bytes)
        stacked = shape[:1] if len(sources) > 1 else ()
        scale_shape = (*stacked, rows, num_blocks(width))
        return QuantizedMatrix(
            packed, self.add_bytes(f"{name}.scales", "F32", scale_shape, scales, 0), rows, width
        )

    def add(
        self, name: str, dtype: str, shape: Sequence[int], params: Sequence[str]
    ) -> ir.ExternalTensor:
        """Plan parameters one after another, as one tensor."""
        specs = [self._spec(param) for param in params]

        def chunks(reader: CheckpointReader) -> Iterator[memoryview]:
            for spec in specs:
                yield from converted(reader, spec, dtype)

        return self.add_bytes(name, dtype, shape, chunks, sum(spec.nbytes for spec in specs))

    def add_bytes(
        self,
        name: str,
        dtype: str,
        shape: Sequence[int],
        chunks: Callable[[CheckpointReader], Iterator[memoryview]],
        source_bytes: int,
    ) -> ir.ExternalTensor:
        """Plan a tensor whose bytes come from `chunks`, once everything is planned."""
        nbytes = prod(shape) * DTYPES[dtype].width_bytes
        boundary = _PAGE_BYTES if nbytes >= _LARGE_BYTES else _LINE_BYTES
        start = -(-self.nbytes // boundary) * boundary
        self.planned.append(PlannedBytes(start, nbytes, name, source_bytes, chunks))
        self.nbytes = start + nbytes
        return external_tensor(name, dtype, shape, file=DATA_FILE, start=start)

    def file_chunks(
        self, reader: CheckpointReader, on_tensor: Callable[[PlannedBytes], None]
    ) -> Iterator[memoryview]:
        """Give the bytes of the whole file in order, those between tensors too."""
        at = 0
        for part in self.planned:
            on_tensor(part)
            if part.start > at:
                yield memoryview(bytes(part.start - at))
            yield from part.chunks(reader)
            at = part.start + part.nbytes

    def _spec(self, param: str) -> TensorSpec:
        return self._index.spec(self._stored_names[param])
