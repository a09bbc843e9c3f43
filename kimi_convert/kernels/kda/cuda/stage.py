"""A stage in CUDA C++: which calls it serves, and its kernels, compiled for those that are made."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kimi_convert.kernels.kda.cuda.compiler import compile_sources
from kimi_convert.kernels.kda.cuda.driver import Kernel, load_kernel
from kimi_convert.kernels.kda.problem import Problem

THREADS = 128  # of a block
WIDTH = 128  # of keys


def unserved(problem: Problem) -> str | None:
    """Return what a call lacks to run in CUDA C++, or None."""
    p = problem
    parameters = [x for x in (p.A_log, p.dt_bias) if x is not None]
    requirements = {
        "a CUDA device": p.v.is_cuda,
        "bf16 q, k and v": p.dtype == torch.bfloat16,
        f"keys of {WIDTH} channels": p.K == WIDTH,
        "g and beta in bf16 or fp32": {p.g.dtype, p.beta.dtype} <= {torch.bfloat16, torch.float32},
        "A_log and dt_bias in fp32": all(x.dtype == torch.float32 for x in parameters),
        "rows that start at 16 bytes": all(x.data_ptr() % 16 == 0 for x in (p.q, p.k, p.g)),
        "cu_seqlens in int64": p.cu_seqlens is None or p.cu_seqlens.dtype == torch.int64,
    }
    return next((name for name, met in requirements.items() if not met), None)


def stage_kernel(
    problem: Problem,
    sources: tuple[str, ...],
    name: str,
    *,
    parameters: str,
    shared_bytes: int,
    **macros: int,
) -> Kernel:
    """Return a kernel for a problem, compiled at its first call in the process: about 2 s.

    Args:
        problem: says the macros that tiles.cuh asks for.
        sources: files beside this one; the stage's own last.
        name: of the kernel.
        parameters: what it is given, as a `struct` format.
        shared_bytes: sizeof(Shared) in the source.
        macros: that the source asks for beyond those.
    """
    p = problem
    return _compiled(
        p.v.device.index,
        sources,
        name,
        parameters,
        SHARED_BYTES=shared_bytes,
        LAW=p.law,
        QK_NORM=int(p.qk_norm),
        BETA_LOGITS=int(p.beta_logits),
        PACKED=int(p.packed),
        G_SINGLE=int(p.g.dtype == torch.float32),
        BETA_SINGLE=int(p.beta.dtype == torch.float32),
        **macros,
    )


def pointers(*tensors: Tensor | None) -> list[int]:
    """Return where tensors lie, 0 for none."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


@cache
def multiprocessors(device: int) -> int:
    """Return how many a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _compiled(
    device: int, sources: tuple[str, ...], name: str, parameters: str, **macros: int
) -> Kernel:
    with torch.cuda.device(device):
        image = compile_sources(
            [Path(__file__).with_name(source) for source in sources],
            capability=torch.cuda.get_device_capability(device),
            macros=macros,
        )
        return load_kernel(
            image,
            name,
            parameters=parameters,
            threads=THREADS,
            shared_bytes=macros["SHARED_BYTES"],
        )
