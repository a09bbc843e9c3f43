"""Checks of the tensors handed to a kernel: sizes, devices and dtypes.

Values are not looked at: that would cost a pass over the data, and a wait on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_convert.errors import KernelInputError

_UP_TO_SINGLE = (torch.bfloat16, torch.float16, torch.float32)
_MAY_BE_EMPTY = ("B", "T")
_ANY_DIMS = "..."


def expect(where: str, **arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Bind the dims that the specs name; refuse the first argument that does not fit.

    A spec lists dims: a name is bound where it first appears and must then be the same
    everywhere, a number must be met exactly, a leading `...` stands for any dims, the same
    ones in every spec that has it. Only B and T may be 0. All tensors share one device.

        dims = expect("chunk_kda", q=(q, "B T H K"), v=(v, "B T H V"), beta=(beta, "B T H"))

    Returns:
        The size of every named dim.

    Raises:
        KernelInputError: Names the argument, what was expected and what was found.
    """
    sizes: dict[str, int] = {}
    leading: tuple[int, ...] | None = None
    device: torch.device | None = None
    for name, (tensor, spec) in arguments.items():
        _expect_tensor(where, name, tensor)
        device = tensor.device if device is None else device
        _expect_device(where, name, tensor, device)
        dims = spec.split()
        if dims[0] == _ANY_DIMS:
            leading = tensor.shape[: 1 - len(dims)] if leading is None else leading
            dims[:1] = map(str, leading)
        if not _bind(sizes, dims, tensor.shape):
            raise KernelInputError(
                f"{name} has the wrong shape",
                where=where,
                expected=_describe(dims, sizes),
                found=list(tensor.shape),
                hint=f"Pass {name} as [{', '.join(spec.split())}] with every size above 0"
                " except B and T; sizes shown as numbers come from the arguments before it.",
            )
    return sizes


def expect_precision(where: str, **tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: fp64 if every tensor is fp64, fp32 if none is.

    Raises:
        KernelInputError: A tensor is not bf16, fp16, fp32 or fp64, or fp64 is mixed with others.
    """
    double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    allowed = (torch.float64,) if double else _UP_TO_SINGLE
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            raise KernelInputError(
                f"{name} has the wrong dtype",
                where=where,
                expected=" or ".join(_short(dtype) for dtype in allowed),
                found=_short(tensor.dtype),
                hint="Pass bf16, fp16 and fp32 tensors in any mix, or fp64 tensors only.",
            )
    return torch.float64 if double else torch.float32


def expect_dtype(where: str, dtype: torch.dtype, **tensors: Tensor) -> None:
    """Refuse the first tensor that is not of exactly this dtype.

    Raises:
        KernelInputError: Names the argument, what was expected and what was found.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise KernelInputError(
                f"{name} has the wrong dtype",
                where=where,
                expected=_short(dtype),
                found=_short(tensor.dtype),
                hint=f"Keep {name} in {_short(dtype)}; it is not cast here.",
            )


def _expect_tensor(where: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise KernelInputError(
            f"{name} is not a tensor",
            where=where,
            expected="torch.Tensor",
            found=type(value).__name__,
            hint=f"Pass {name} as a torch.Tensor.",
        )


def _expect_device(where: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise KernelInputError(
            f"{name} is on the wrong device",
            where=where,
            expected=device,
            found=tensor.device,
            hint=f"Move all arguments of {where} to one device.",
        )


def _bind(sizes: dict[str, int], dims: list[str], shape: tuple[int, ...]) -> bool:
    """Say whether the shape fits; if so, remember in `sizes` the dims that were new."""
    if len(dims) != len(shape):
        return False
    new: dict[str, int] = {}
    for dim, size in zip(dims, shape, strict=True):
        known = int(dim) if dim.isdigit() else sizes.get(dim, new.get(dim))
        if known is None:
            new[dim] = size
        elif size != known:
            return False
    if any(size == 0 for dim, size in new.items() if dim not in _MAY_BE_EMPTY):
        return False
    sizes.update(new)
    return True


def _describe(dims: list[str], sizes: dict[str, int]) -> str:
    return f"[{', '.join(f'{dim}={sizes[dim]}' if dim in sizes else dim for dim in dims)}]"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
