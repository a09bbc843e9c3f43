"""Which implementation of a kernel runs: plain torch anywhere, Triton on a GPU.

Triton comes with the CUDA builds of torch. It is imported when a Triton kernel is first asked
for, never before, so that the package works without it.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import cache
from importlib.util import find_spec

import torch

from kimi_convert.errors import KernelInputError

_NOWHERE_ELSE = nullcontext()


class Backend(StrEnum):
    """An implementation."""

    TORCH = "torch"
    TRITON = "triton"
    CUDA = "cuda"  # Triton, but for stages of KDA that also exist in CUDA C++


def resolve_backend(
    backend: Backend | str | None,
    *,
    where: str,
    device: torch.device,
    dtype: torch.dtype,
    also: tuple[Backend, ...] = (),
) -> Backend:
    """Return what runs: what was asked for, else Triton on a GPU and torch elsewhere.

    Args:
        backend: None to choose by device; fp64 is always torch's then.
        where: name of the public function, for the error.
        device: of the tensors.
        dtype: that is computed in; Triton kernels have no fp64.
        also: backends beyond these two that the function has.

    Raises:
        KernelInputError: there is no such backend, or it cannot run here.
    """
    if backend is None:
        serves = device.type == "cuda" and dtype != torch.float64 and _has_triton()
        return Backend.TRITON if serves else Backend.TORCH
    if backend not in (Backend.TORCH, Backend.TRITON, *also):
        raise KernelInputError(
            "there is no such backend",
            where=where,
            expected=" or ".join((Backend.TORCH, Backend.TRITON, *also)),
            found=repr(backend),
        )
    backend = Backend(backend)
    if backend is not Backend.TORCH:
        _check_triton(where, device, dtype)
    return backend


def interprets() -> bool:
    """Say whether Triton kernels run on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Have Triton launch on a device: by itself it takes the current one."""
    # Made current again where it already is, it would cost as much as a launch.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOWHERE_ELSE
    return torch.cuda.device(device)


def _check_triton(where: str, device: torch.device, dtype: torch.dtype) -> None:
    problem = expected = None
    if not _has_triton():
        problem, expected = "triton is not installed", "pip install 'kimi-convert[triton]'"
    elif dtype == torch.float64:
        problem, expected = "the Triton kernels have no fp64", "bf16, fp16 or fp32"
    elif device.type != "cuda" and not (device.type == "cpu" and interprets()):
        problem = "the Triton kernels need a CUDA device"
        expected = "tensors on a CUDA device, or TRITON_INTERPRET=1"
    if problem:
        raise KernelInputError(
            problem,
            where=where,
            expected=expected,
            found=f"{dtype} on {device}",
            hint='Pass backend="torch", which runs anywhere.',
        )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
