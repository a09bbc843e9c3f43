"""The dtypes a safetensors file may hold: file names, widths in bytes, torch names.

Sub-byte dtypes (F4, F6) are left out: their shapes do not count bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from kimi_convert.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dtype:
    """One row of the table."""

    name: str  # in a safetensors header
    width_bytes: int  # of one element
    torch_name: str  # attribute of the torch module


_ROWS = (
    Dtype("BOOL", 1, "bool"),
    Dtype("U8", 1, "uint8"),
    Dtype("I8", 1, "int8"),
    Dtype("F8_E4M3", 1, "float8_e4m3fn"),
    Dtype("F8_E5M2", 1, "float8_e5m2"),
    Dtype("F8_E8M0", 1, "float8_e8m0fnu"),
    Dtype("U16", 2, "uint16"),
    Dtype("I16", 2, "int16"),
    Dtype("F16", 2, "float16"),
    Dtype("BF16", 2, "bfloat16"),
    Dtype("U32", 4, "uint32"),
    Dtype("I32", 4, "int32"),
    Dtype("F32", 4, "float32"),
    Dtype("U64", 8, "uint64"),
    Dtype("I64", 8, "int64"),
    Dtype("F64", 8, "float64"),
)

DTYPES: Mapping[str, Dtype] = MappingProxyType({row.name: row for row in _ROWS})
_BY_TORCH_NAME: Mapping[str, Dtype] = MappingProxyType({row.torch_name: row for row in _ROWS})


def dtype_from_torch_name(torch_name: str) -> str:
    """Return the safetensors name of a torch dtype name such as "bfloat16".

    Raises:
        CheckpointError: no safetensors dtype has this name.
    """
    row = _BY_TORCH_NAME.get(torch_name)
    if row is None:
        raise CheckpointError(
            "unknown dtype name", expected=", ".join(_BY_TORCH_NAME), found=repr(torch_name)
        )
    return row.name


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name such as "BF16"; imports torch.

    Raises:
        CheckpointError: the name is not in the table.
    """
    row = DTYPES.get(name)
    if row is None:
        raise CheckpointError("unknown dtype", expected=", ".join(DTYPES), found=repr(name))

    import torch

    found: object = getattr(torch, row.torch_name)
    assert isinstance(found, torch.dtype)
    return found
