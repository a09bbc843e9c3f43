"""Kernels from machine code, launched on PyTorch's streams through the CUDA driver."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from kimi_convert.errors import KernelInputError

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute
_PARAM_BUFFER_POINTER, _PARAM_BUFFER_SIZE = 1, 2


class DriverError(KernelInputError):
    """The CUDA driver refuses a kernel or a launch."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function on a device."""

    handle: ctypes.c_void_p
    parameters: struct.Struct  # its arguments, as C lays them out: P pointer, i int, f float
    threads: int  # of a block
    shared_bytes: int  # of a block

    def launch(self, device: int, grid: tuple[int, int], arguments: Sequence[int | float]) -> None:
        """Launch blocks on a device's current stream; pointers as integers, 0 for none."""
        _enter_context()
        packed = self.parameters.pack(*arguments)
        buffer = ctypes.create_string_buffer(packed, len(packed))
        size = ctypes.c_size_t(len(packed))
        extra = (ctypes.c_void_p * 5)(
            _PARAM_BUFFER_POINTER,
            ctypes.addressof(buffer),
            _PARAM_BUFFER_SIZE,
            ctypes.addressof(size),
            None,
        )
        stream = ctypes.c_void_p(_current_stream(device))
        _check(
            _driver().cuLaunchKernel(
                self.handle, *grid, 1, self.threads, 1, 1, self.shared_bytes, stream, None, extra
            )
        )


def load_kernel(
    image: bytes, name: str, *, parameters: str, threads: int, shared_bytes: int
) -> Kernel:
    """Load a function of a cubin into the current device's context, for as long as the process runs.

    Args:
        image: a cubin.
        name: of the function.
        parameters: its arguments as a `struct` format.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.

    Raises:
        DriverError: the driver refuses it.
    """
    driver = _driver()
    _enter_context()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), image))
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    attribute = _MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return Kernel(function, struct.Struct(parameters), threads, shared_bytes)


def _current_stream(device: int) -> int:
    """Return the handle of PyTorch's current stream.

    The public way makes a Stream object, which takes longer than the launch; Triton asks as here.
    """
    raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device).cuda_stream if raw is None else raw(device)


def _enter_context() -> None:
    """Make PyTorch's context current: a thread of autograd's starts without one."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        torch.cuda.set_device(torch.cuda.current_device())


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        found = (text.value or b"").decode() or f"error {result}"
        raise DriverError("the CUDA driver refuses", where="kda_intra", found=found)
