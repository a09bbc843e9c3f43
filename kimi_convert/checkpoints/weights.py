"""The weights of a checkpoint as a model sees them, whatever tensors they are stored in.

A weight is one stored tensor, or several where it is quantised: values, scales, a shape. Each
format is a row of a table. Text models inside multimodal checkpoints have their names under a
prefix, which is taken off; the other parts are left out, with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kimi_convert.checkpoints.mapping import Dropped
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.config.quantization import Encoding, Quantization
from kimi_convert.errors import CheckpointError

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight: its values' dtype and shape, and the tensors that hold it."""

    name: str
    dtype: str  # of its values: as stored, or what a quantised one is decoded to
    shape: tuple[int, ...]
    stored: tuple[TensorSpec, ...]  # values first, then scales, then the shape
    quantization: Quantization | None = None  # None where it is stored plain

    @property
    def stored_bytes(self) -> int:
        """Bytes in the files."""
        return sum(tensor.nbytes for tensor in self.stored)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names in the files."""
        return tuple(tensor.name for tensor in self.stored)


@dataclass(frozen=True, slots=True)
class Weights:
    """Every weight by its plain name, in the order of the files, and what is left out."""

    by_name: Mapping[str, Weight]
    left_out: tuple[Dropped, ...]


@dataclass(frozen=True, slots=True)
class _Format:
    """One row of the table: how a quantised weight X.weight is stored."""

    values: str  # suffix after X
    value_dtypes: tuple[str, ...]
    per_value: int  # columns in one stored element
    scales: str
    scale_dtypes: tuple[str, ...]
    shape: str = ""  # suffix of a tensor with the shape; "" where there is none


_FORMATS: Mapping[Encoding, _Format] = MappingProxyType(
    {
        # The name says "inv", but weights are multiplied by it (DeepSeek-V3, README_WEIGHTS.md).
        Encoding.FP8_BLOCK: _Format(
            _WEIGHT, ("F8_E4M3",), 1, ".weight_scale_inv", ("F32", "BF16")
        ),
        # compressed-tensors, "pack-quantized": the lowest nibble of a word is its first column.
        Encoding.INT4_GROUP: _Format(
            ".weight_packed",
            ("I32",),
            8,
            ".weight_scale",
            ("BF16", "F16", "F32"),
            ".weight_shape",
        ),
        # compressed-tensors, "mxfp4-pack-quantized": the low nibble is the even column.
        Encoding.MXFP4: _Format(".weight_packed", ("U8",), 2, ".weight_scale", ("U8", "F8_E8M0")),
    }
)


@dataclass(frozen=True, slots=True)
class _Nesting:
    """Where a checkpoint keeps its text model: names that start with `prefix` lose it."""

    prefix: str
    becomes: str = ""


_ANCHOR = "model.embed_tokens.weight"  # every text model has it: it tells the nesting
_NESTINGS = (_Nesting("language_model."), _Nesting("model.language_model.", "model."))
_OTHER_PARTS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        (
            "vision_tower.",
            "mm_projector.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.visual.",
            "model.multi_modal_projector.",
        ),
        "the target format holds text models alone: no image encoder and no projector",
    )
)


def read_weights(
    stored: Iterable[TensorSpec],
    *,
    quantization: Quantization | None,
    dtype: str,
    where: object,
) -> Weights:
    """Group stored tensors into weights.

    Args:
        stored: every tensor of the checkpoint.
        quantization: how quantised weights are stored; others are plain.
        dtype: safetensors name of what quantised weights are decoded to.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: scales or a shape are missing, or of the wrong shape or dtype.
    """
    by_name, left_out = _unnested({tensor.name: tensor for tensor in stored})
    if quantization is None:
        plain = {
            name: Weight(name, tensor.dtype, tensor.shape, (tensor,))
            for name, tensor in by_name.items()
        }
        return Weights(plain, left_out)
    gather = _Gatherer(by_name, quantization, dtype, where)
    return Weights(gather.weights(), left_out)


class _Gatherer:
    """Puts the tensors of each quantised weight together."""

    def __init__(
        self,
        tensors: Mapping[str, TensorSpec],
        quantization: Quantization,
        dtype: str,
        where: object,
    ) -> None:
        self._tensors = tensors
        self._quantization = quantization
        self._format = _FORMATS[quantization.encoding]
        self._dtype = dtype
        self._where = where

    def weights(self) -> dict[str, Weight]:
        row = self._format
        quantised = {
            name: self._weight(name.removesuffix(row.values), tensor)
            for name, tensor in self._tensors.items()
            if name.endswith(row.values) and tensor.dtype in row.value_dtypes
        }
        used = {part.name for weight in quantised.values() for part in weight.stored}
        found: dict[str, Weight] = {}
        for name, tensor in self._tensors.items():
            if name in quantised:
                found[quantised[name].name] = quantised[name]
            elif tensor.name not in used:
                found[name] = Weight(name, tensor.dtype, tensor.shape, (tensor,))
        return found

    def _weight(self, stem: str, values: TensorSpec) -> Weight:
        row, tile = self._format, self._quantization
        if len(values.shape) != 2:
            raise self._wrong(values, "a matrix", list(values.shape))
        rows, columns = values.shape[0], values.shape[1] * row.per_value
        scales = self._part(stem + row.scales, values)
        expected = [-(-rows // tile.tile_rows), -(-columns // tile.tile_columns)]
        if list(scales.shape) != expected:
            raise self._wrong(scales, f"shape {expected}", f"shape {list(scales.shape)}")
        if scales.dtype not in row.scale_dtypes:
            raise self._wrong(scales, " or ".join(row.scale_dtypes), scales.dtype)
        stored = (values, scales)
        if row.shape:
            shape = self._part(stem + row.shape, values)
            if shape.dtype not in ("I32", "I64") or shape.shape != (2,):
                raise self._wrong(shape, "I32 [2]", f"{shape.dtype} {list(shape.shape)}")
            stored = (*stored, shape)
        return Weight(stem + _WEIGHT, self._dtype, (rows, columns), stored, tile)

    def _part(self, name: str, values: TensorSpec) -> TensorSpec:
        found = self._tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"quantised weight {quoted(values.name)} lacks {quoted(name)}",
                where=self._where,
                expected="it in any file of the checkpoint",
                found="nowhere",
                hint="Download the checkpoint again; its values mean nothing without it.",
            )
        return found

    def _wrong(self, tensor: TensorSpec, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"part {quoted(tensor.name)} of a quantised weight is not valid",
            where=self._where,
            expected=expected,
            found=found,
            hint="Its file or quantization_config belongs to another checkpoint.",
        )


def _unnested(
    stored: Mapping[str, TensorSpec],
) -> tuple[dict[str, TensorSpec], tuple[Dropped, ...]]:
    """Take the prefix off, and set the parts aside that are no text model."""
    nesting = next(
        (one for one in _NESTINGS if one.prefix + _ANCHOR.removeprefix(one.becomes) in stored),
        None,
    )
    if nesting is None or _ANCHOR in stored:
        return dict(stored), ()
    kept: dict[str, TensorSpec] = {}
    left_out: list[Dropped] = []
    for name, tensor in stored.items():
        plain = nesting.becomes + name.removeprefix(nesting.prefix)
        # A name that would be there twice stays as it is, and is refused as unknown.
        if name.startswith(nesting.prefix) and plain not in stored:
            kept[plain] = tensor
            continue
        why = next((why for part, why in _OTHER_PARTS.items() if name.startswith(part)), None)
        if why is None:
            kept[name] = tensor
        else:
            left_out.append(Dropped(name, why))
    return kept, tuple(left_out)
