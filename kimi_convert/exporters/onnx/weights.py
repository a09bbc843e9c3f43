"""Where the weights of a graph lie: in the checkpoint's own files, or in one file that is written.

A store hands out tensors that name a file, an offset and a length; it reads no weight while the
graph is built. What `CopiedWeights` hands out is written afterwards, in the order in which it was
asked for, one tensor in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import onnx_ir as ir

from kimi_convert.checkpoints.dtypes import torch_dtype
from kimi_convert.checkpoints.index import CheckpointIndex
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.errors import CheckpointError

DATA_FILE = "model.onnx.data"

_DTYPES: Mapping[str, ir.DataType] = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}
# Large tensors begin on a page, so that they can be mapped; small ones on a cache line.
_PAGE_BYTES, _LINE_BYTES, _LARGE_BYTES = 4096, 64, 1 << 20

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


class WeightStore(Protocol):
    """What a graph asks for; each tensor once."""

    def tensor(self, param: str) -> ir.ExternalTensor:
        """Return the tensor of a parameter."""
        ...

    def experts(self, layer_idx: int) -> StackedExperts:
        """Return the routed experts of a layer."""
        ...

    def fused_experts(self, layer_idx: int) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """Return gate and up [E, 2 F, D], their rows interleaved, and down [E, D, F]."""
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

    def tensor(self, param: str) -> ir.ExternalTensor:
        """Return the tensor of a parameter, under its name in the checkpoint."""
        spec = self._index.spec(self._stored_names[param])
        return _external(spec.name, spec.dtype, spec.shape, file=spec.shard, start=spec.start)

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
            _external(
                f"layers.{layer_idx}.experts.{number}",
                run[0].dtype,
                (len(run), prod(run[0].shape)),
                file=run[0].shard,
                start=run[0].start,
            )
            for number, run in enumerate(runs)
        )
        return StackedExperts(segments, _by_projection(rows, sizes.num_experts))

    def fused_experts(self, layer_idx: int) -> tuple[ir.ExternalTensor, ir.ExternalTensor]:
        """Refuse: interleaved rows are in no checkpoint."""
        raise AssertionError(f"options forbid fused experts in place, layer {layer_idx}")

    def _spec(self, layer_idx: int, projection: str, expert: int) -> TensorSpec:
        return self._index.spec(self._stored_names[expert_param(layer_idx, expert, projection)])


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

    def tensor(self, param: str) -> ir.ExternalTensor:
        """Return the tensor of a parameter, in the dtype that weights become."""
        spec = self._spec(param)
        return self.add(spec.name, self._dtype, spec.shape, (param,))

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
        return StackedExperts((stacked,), _by_projection(rows, count))

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
                yield from _interleaved(reader, gate, up, dtype)

        source_bytes = sum(spec.nbytes for part in ("gate", "up") for spec in specs[part])
        name = f"layers.{layer_idx}.experts."
        gate_up = self.add_bytes(
            name + "gate_up", dtype, (count, 2 * hidden, width), interleaved, source_bytes
        )
        params = [expert_param(layer_idx, expert, "down") for expert in range(count)]
        return gate_up, self.add(name + "down", dtype, (count, width, hidden), params)

    def add(
        self, name: str, dtype: str, shape: Sequence[int], params: Sequence[str]
    ) -> ir.ExternalTensor:
        """Plan parameters one after another, as one tensor."""
        specs = [self._spec(param) for param in params]

        def chunks(reader: CheckpointReader) -> Iterator[memoryview]:
            for spec in specs:
                yield from _converted(reader, spec, dtype)

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
        nbytes = prod(shape) * torch_dtype(dtype).itemsize
        boundary = _PAGE_BYTES if nbytes >= _LARGE_BYTES else _LINE_BYTES
        start = -(-self.nbytes // boundary) * boundary
        self.planned.append(PlannedBytes(start, nbytes, name, source_bytes, chunks))
        self.nbytes = start + nbytes
        return _external(name, dtype, shape, file=DATA_FILE, start=start)

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


def expert_param(layer_idx: int, expert: int, projection: str) -> str:
    """Return the parameter of one expert's matrix."""
    return f"layers.{layer_idx}.moe.experts.{expert}.{projection}.weight"


def _external(
    name: str, dtype: str, shape: Sequence[int], *, file: str, start: int
) -> ir.ExternalTensor:
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


def _by_projection(
    rows: Mapping[tuple[str, int], int], num_experts: int
) -> dict[str, tuple[int, ...]]:
    return {
        projection: tuple(rows[projection, expert] for expert in range(num_experts))
        for projection in PROJECTIONS
    }


def _interleaved(
    reader: CheckpointReader, one: TensorSpec, other: TensorSpec, dtype: str
) -> Iterator[memoryview]:
    """Give two matrices row by row in turn."""
    whole = [
        np.frombuffer(b"".join(_converted(reader, spec, dtype)), dtype=np.uint8).reshape(
            spec.shape[0], -1
        )
        for spec in (one, other)
    ]
    yield memoryview(np.stack(whole, axis=1).reshape(-1).data)


def _converted(reader: CheckpointReader, spec: TensorSpec, dtype: str) -> Iterator[memoryview]:
    """Give a tensor's bytes in another dtype; refuse values that are not finite there."""
    import torch

    from kimi_convert.checkpoints.tensor_bytes import tensor_bytes

    source, target = torch_dtype(spec.dtype), torch_dtype(dtype)
    for chunk in reader.chunks(spec.name):
        values = torch.frombuffer(chunk, dtype=source).to(target)
        low, high = values.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise CheckpointError(
                f"tensor {quoted(spec.name)} holds values that {dtype} cannot hold",
                where=reader.index.shards[spec.shard].path,
                found="NaN, Inf or a value too large",
                hint="Export with --precision fp32; if that fails too, the checkpoint is damaged.",
            )
        yield chunk if source is target else tensor_bytes(values)
