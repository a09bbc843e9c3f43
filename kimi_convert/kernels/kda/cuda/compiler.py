"""CUDA C++ sources to machine code of a device, with the NVRTC that PyTorch brings.

No compiler has to be installed: CUDA builds of PyTorch depend on NVRTC. Where it is missing, the
callers take another backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from kimi_convert.errors import KernelInputError


class CompileError(KernelInputError):
    """NVRTC is missing or refuses a source; the log is in `found`."""


def compile_sources(
    sources: Sequence[Path], *, capability: tuple[int, int], macros: Mapping[str, int]
) -> bytes:
    """Return the cubin of sources that include nothing.

    Args:
        sources: files, taken one after another as one.
        capability: of the device, (9, 0) for Hopper.
        macros: defined before the sources are read.

    Raises:
        CompileError: NVRTC is not installed, too old for the device, or finds an error.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    text = b"\n".join(
        f'#line 1 "{source.name}"\n'.encode() + source.read_bytes() for source in sources
    )
    name = sources[-1].name.encode()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
    try:
        options = [
            f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode(),
            b"--std=c++17",
        ]
        options += [f"-D{macro}={value}".encode() for macro, value in macros.items()]
        array = (ctypes.c_char_p * len(options))(*options)
        result = nvrtc.nvrtcCompileProgram(program, len(options), array)
        if result:
            raise CompileError(
                f"{sources[-1].name} does not compile", where="NVRTC", found=_log(nvrtc, program)
            )
        size = ctypes.c_size_t()
        _check(nvrtc, nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        image = ctypes.create_string_buffer(size.value)
        _check(nvrtc, nvrtc.nvrtcGetCUBIN(program, image))
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc() -> ctypes.CDLL:
    """Load the NVRTC of the CUDA release that PyTorch was built for."""
    major = str(torch.version.cuda or "").partition(".")[0]
    name = f"libnvrtc.so.{major}"
    for candidate in (name, *_installed(name)):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise CompileError(
        "NVRTC is not installed",
        where="compile_sources",
        expected=name,
        hint="It comes with the CUDA builds of PyTorch; Triton serves without it.",
    )


def _installed(name: str) -> list[str]:
    """Return where NVIDIA's Python packages hold a library."""
    spec = find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return [str(path) for folder in folders for path in sorted(Path(folder).glob(f"*/lib/{name}"))]


def _log(nvrtc: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    _check(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    return log.value.decode(errors="replace").strip()


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError("NVRTC failed", found=nvrtc.nvrtcGetErrorString(result).decode())
