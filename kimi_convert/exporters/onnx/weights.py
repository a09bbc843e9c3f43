"""Where a graph finds its weights, and weights that lie in the checkpoint's own files.

A store hands out tensors that name a file, an offset and a length; it reads no weight while the
graph is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from kimi_convert.checkpoints.index import CheckpointIndex
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.errors import CheckpointError

_DTYPES: Mapping[str, ir.DataType] = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "U8": ir.DataType.UINT8,
}
# Runs of experts that lie back to back: a layer may be cut by the end of a file. Every further one is
# another branch for each matrix that is fetched.
_MAX_RUNS = 4

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """All routed matrices of one layer, each one row of one of `segments`.

    Rows count through the segments. A matrix is row-major; all of them have as many elements.
    """

    segments: tuple[ir.ExternalTensor, ...]  # each [rows, F D]
    rows: Mapping[str, tuple[int, ...]]  # projection -> row of each expert


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """Integers and scales of a matrix [rows, width], in the shapes that its operator asks for."""

    packed: ir.ExternalTensor
    scales: ir.ExternalTensor
    rows: int
    width: int


class WeightStore(Protocol):
    """What a graph asks for; each tensor once."""

    def tensor(self, param: str, *, wide: bool = False) -> ir.ExternalTensor:
        """Return the tensor of a parameter; `wide` if nothing should be lost of it."""
        ...

    def experts(self, layer_idx: int) -> StackedExperts:
        """Return the routed experts of a layer."""
        ...

    def fused_experts(self, layer_idx: int) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """Return gate and up [E, 2 F, D], their rows interleaved, and down [E, D, F]."""
        ...

    def quantized(self, param: str, bits: int) -> QuantizedMatrix:
        """Return a matrix for MatMulNBits."""
        ...

    def quantized_table(self, param: str, bits: int) -> QuantizedMatrix:
        """Return a matrix for GatherBlockQuantized."""
        ...

    def quantized_experts(
        self, layer_idx: int, bits: int
    ) -> tuple[QuantizedMatrix, QuantizedMatrix]:
        """Return gate and up, their rows interleaved, and down, for QMoE."""
        ...


class InplaceWeights:
    """Tensors that lie in the checkpoint's own files."""

    def __init__(
        self, index: CheckpointIndex, stored_names: Mapping[str, str], config: ModelConfig
    ) -> None:
        """Take a checkpoint whose names are known."""
        self._index = index
        self._stored_names = stored_names
        self._config = config

    def tensor(self, param: str, *, wide: bool = False) -> ir.ExternalTensor:
        """Return the tensor of a parameter, under its name in the checkpoint and as it is."""
        spec = self._index.spec(self._stored_names[param])
        return external_tensor(
            spec.name, spec.dtype, spec.shape, file=spec.shard, start=spec.start
        )

    def experts(self, layer_idx: int) -> StackedExperts:
        """Return the experts of a layer where they lie, in few runs of tensors back to back.

        Raises:
            CheckpointError: they are scattered, or stored in more than one dtype.
        """
        sizes = self._config.moe
        assert sizes is not None
        specs = {
            (projection, expert): self._spec(layer_idx, projection, expert)
            for projection in PROJECTIONS
            for expert in range(sizes.num_experts)
        }
        ordered = sorted(specs, key=lambda key: (specs[key].shard, specs[key].start))
        rows = {key: row for row, key in enumerate(ordered)}
        runs = _runs([specs[key] for key in ordered])
        if len(runs) > _MAX_RUNS or len({spec.dtype for spec in specs.values()}) > 1:
            raise CheckpointError(
                f"the experts of layer {layer_idx} do not lie back to back",
                where=self._index.folder,
                expected=f"{len(specs)} tensors of one dtype in at most {_MAX_RUNS} runs",
                found=f"{len(runs)} runs",
                hint="Export with --weights copy, or write the checkpoint again with "
                "`kimi-convert export safetensors`.",
            )
        segments = tuple(
            external_tensor(
                f"layers.{layer_idx}.experts.{number}",
                run[0].dtype,
                (len(run), prod(run[0].shape)),
                file=run[0].shard,
                start=run[0].start,
            )
            for number, run in enumerate(runs)
        )
        return StackedExperts(segments, rows_by_projection(rows, sizes.num_experts))

    def fused_experts(self, layer_idx: int) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """Fail: options refuse what no checkpoint holds."""
        raise AssertionError(f"interleaved experts of layer {layer_idx} in place")

    def quantized(self, param: str, bits: int) -> QuantizedMatrix:
        """Fail: options refuse what no checkpoint holds."""
        raise AssertionError(f"{param} in {bits} bits in place")

    quantized_table = quantized

    def quantized_experts(
        self, layer_idx: int, bits: int
    ) -> tuple[QuantizedMatrix, QuantizedMatrix]:
        """Fail: options refuse what no checkpoint holds."""
        raise AssertionError(f"experts of layer {layer_idx} in {bits} bits in place")

    def _spec(self, layer_idx: int, projection: str, expert: int) -> TensorSpec:
        return self._index.spec(self._stored_names[expert_param(layer_idx, expert, projection)])


def expert_param(layer_idx: int, expert: int, projection: str) -> str:
    """Return the parameter of one expert's matrix."""
    return f"layers.{layer_idx}.moe.experts.{expert}.{projection}.weight"


def external_tensor(
    name: str, dtype: str, shape: Sequence[int], *, file: str, start: int
) -> ir.ExternalTensor:
    """Return a tensor that lies in a file; `dtype` is the safetensors name.

    Raises:
        CheckpointError: the file is not beside the graph.
    """
    if file != Path(file).name:
        raise CheckpointError(
            "weights of a graph must lie beside it",
            expected="a plain file name",
            found=quoted(file),
            hint="Export with --weights copy.",
        )
    data_type = _DTYPES[dtype]
    nbytes = prod(shape) * int(data_type.itemsize)
    return ir.ExternalTensor(file, start, nbytes, data_type, shape=ir.Shape(shape), name=name)


def _runs(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Cut ordered tensors where one does not begin at the end of the last."""
    runs: list[list[TensorSpec]] = []
    for spec in specs:
        last = runs[-1][-1] if runs else None
        if last is not None and (last.shard, last.end) == (spec.shard, spec.start):
            runs[-1].append(spec)
        else:
            runs.append([spec])
    return runs


def rows_by_projection(
    rows: Mapping[tuple[str, int], int], num_experts: int
) -> dict[str, tuple[int, ...]]:
    """Return the row of each expert by projection, from rows by projection and expert."""
    return {
        projection: tuple(rows[projection, expert] for expert in range(num_experts))
        for projection in PROJECTIONS
    }
