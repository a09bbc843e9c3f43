"""Whether the stages in CUDA C++ run: where they serve a call, and the machine takes them."""

from __future__ import annotations

import logging
from functools import cache

import torch

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.backend import Backend
from kimi_convert.kernels.kda.cuda.compiler import CompileError
from kimi_convert.kernels.kda.cuda.driver import DriverError
from kimi_convert.kernels.kda.cuda.intra import kda_intra_cuda
from kimi_convert.kernels.kda.cuda.stage import unserved
from kimi_convert.kernels.kda.device import PRECOMPUTED
from kimi_convert.kernels.kda.problem import Problem

_LOGGER = logging.getLogger(__name__)


def takes_cuda(problem: Problem, backend: Backend | None) -> bool:
    """Say whether the CUDA stages run; refuse if they are asked for and cannot."""
    if backend is Backend.TRITON:
        return False
    missing = unserved(problem)
    if missing is None and backend is None:
        return _cuda_works(problem.v.device.index)
    if missing is not None and backend is Backend.CUDA:
        raise KernelInputError(
            "the CUDA stages do not serve this call",
            where="chunk_kda",
            expected=missing,
            found='backend="cuda"',
            hint='Pass backend="triton", or None to let the call decide.',
        )
    return missing is None


@cache
def _cuda_works(device: int) -> bool:
    """Say, once for each device, whether NVRTC and the driver take the stages; log why not."""
    example = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16, device=torch.device("cuda", device))
    problem = Problem(
        q=example,
        k=example,
        v=example,
        g=example,
        beta=example[..., 0].contiguous(),
        scale=1.0,
        A_log=None,
        dt_bias=None,
        law=PRECOMPUTED.value,
        lower_bound=0.0,
        qk_norm=False,
        beta_logits=False,
        cu_seqlens=None,
        chunk_offsets=None,
        C=64,
    )
    try:
        kda_intra_cuda(problem)
    except (CompileError, DriverError) as error:
        _LOGGER.warning("KDA runs on Triton alone, which is slower: %s", error)
        return False
    return True
