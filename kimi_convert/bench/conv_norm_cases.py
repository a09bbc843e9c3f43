"""The short convolutions and norms that are timed, and whose: ours, torch's, FLA's if installed.

Sizes are those of a Kimi-Linear-48B layer: 32 heads of 128 channels, a model width of 2304. Every
tensor is bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_convert.bench.kernel_cases import WIDTH, Work
from kimi_convert.bench.kernel_peers import Call
from kimi_convert.kernels.backend import Backend
from kimi_convert.kernels.norm import gated_rms_norm, l2_norm, rms_norm
from kimi_convert.kernels.short_conv import short_conv_qkv, short_conv_qkv_

_MODEL_WIDTH = 2304
_TAPS = 4
_EPS = 1e-5
_ELEMENT_BYTES = 2


class Op(StrEnum):
    """What is timed."""

    CONV = "conv"  # q, k and v, with their states
    RMS = "rms"  # of the model's width
    GATED = "gated"  # of every head
    L2 = "l2"  # of every head


# Tensors as large as the input that are read or written at least: forward, and backward after it.
_FORWARD = {Op.CONV: 2, Op.RMS: 2, Op.GATED: 3, Op.L2: 2}
_BACKWARD = {Op.CONV: 3, Op.RMS: 3, Op.GATED: 5, Op.L2: 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvNormCase:
    """One call."""

    op: Op
    work: Work
    B: int
    T: int
    H: int = 32

    @property
    def name(self) -> str:
        """A short name."""
        return f"{self.op} {self.work} B={self.B} T={self.T} H={self.H}"

    @property
    def channels(self) -> int:
        """Of a token, in all inputs that are worked on alike."""
        match self.op:
            case Op.CONV:
                return 3 * self.H * WIDTH
            case Op.RMS:
                return _MODEL_WIDTH
            case Op.GATED | Op.L2:
                return self.H * WIDTH

    @property
    def floor_bytes(self) -> int:
        """Bytes of every input read once and every result written once; gradients likewise."""
        tensors = _FORWARD[self.op] + (_BACKWARD[self.op] if self.work is Work.TRAINING else 0)
        values = tensors * self.B * self.T * self.channels
        if self.op is Op.CONV:
            states = 2 if self.work is Work.DECODE else 1  # a prefill only writes them
            values += states * self.B * self.channels * (_TAPS - 1)
        return values * _ELEMENT_BYTES


CONV_NORM_CASES = (
    *(ConvNormCase(op=Op.CONV, work=Work.PREFILL, B=1, T=T) for T in (1024, 8192, 65536)),
    ConvNormCase(op=Op.CONV, work=Work.TRAINING, B=1, T=8192),
    *(ConvNormCase(op=Op.CONV, work=Work.DECODE, B=B, T=1) for B in (1, 64, 256)),
    *(
        ConvNormCase(op=op, work=work, B=1, T=8192)
        for op in (Op.RMS, Op.GATED, Op.L2)
        for work in (Work.PREFILL, Work.TRAINING)
    ),
    ConvNormCase(op=Op.RMS, work=Work.PREFILL, B=1, T=1),
)

_Outputs = tuple[Tensor, ...]
_Run = Callable[..., _Outputs]  # from the inputs that have gradients to the outputs


def conv_norm_peers(case: ConvNormCase, device: torch.device) -> Mapping[str, Call]:
    """Return a call for each implementation that serves the case here, all on the same inputs."""
    makers = {Op.CONV: _conv_runs, Op.RMS: _rms_runs, Op.GATED: _gated_runs, Op.L2: _l2_runs}
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    inputs, runs = makers[case.op](case, normal)
    return {
        who: _call(case, run, inputs)
        for who, run in runs.items()
        if device.type == "cuda" or who not in ("ours", "fla")
    }


def _conv_runs(
    case: ConvNormCase, normal: Callable[..., Tensor]
) -> tuple[_Outputs, Mapping[str, _Run]]:
    P = case.H * WIDTH
    xs = tuple(normal(case.B, case.T, P) for _ in range(3))
    weights = tuple(normal(P, 1, _TAPS) for _ in range(3))
    if case.work is Work.DECODE:
        return (*xs, *weights), _conv_steps(case.B, P, normal)
    runs: dict[str, _Run] = {
        "ours": lambda *x: short_conv_qkv(x[:3], x[3:], backend=Backend.TRITON)[0],
        "torch": lambda *x: short_conv_qkv(x[:3], x[3:], backend=Backend.TORCH)[0],
        "conv1d": lambda *x: tuple(map(_by_conv1d, x[:3], x[3:])),
    }
    if find_spec("fla"):
        convolve = import_module("fla.modules.conv").causal_conv1d
        options = {"activation": "silu", "output_final_state": True}
        runs["fla"] = lambda *x: tuple(
            convolve(of_one, weight.squeeze(1), **options)[0]
            for of_one, weight in zip(x[:3], x[3:], strict=True)
        )
    return (*xs, *weights), runs


def _conv_steps(B: int, P: int, normal: Callable[..., Tensor]) -> Mapping[str, _Run]:
    q, k, v = (normal(B, P, _TAPS - 1) for _ in range(3))
    runs: dict[str, _Run] = {
        "ours": lambda *x: short_conv_qkv_(x[:3], x[3:], (q, k, v), backend=Backend.TRITON),
        "torch": lambda *x: short_conv_qkv_(x[:3], x[3:], (q, k, v), backend=Backend.TORCH),
    }
    if find_spec("fla"):
        step = import_module("fla.modules.convolution").causal_conv1d_update
        caches = [normal(B, P, _TAPS) for _ in range(3)]
        runs["fla"] = lambda *x: tuple(
            step(of_one, cache, None, weight.squeeze(1), None, "silu")[0]
            for of_one, cache, weight in zip(x[:3], caches, x[3:], strict=True)
        )
    return runs


def _by_conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve by torch's own convolution, without the state."""
    padded = F.pad(x.mT, (_TAPS - 1, 0))
    return F.silu(F.conv1d(padded, weight, groups=weight.shape[0])).mT


def _rms_runs(
    case: ConvNormCase, normal: Callable[..., Tensor]
) -> tuple[_Outputs, Mapping[str, _Run]]:
    inputs = normal(case.B, case.T, _MODEL_WIDTH), normal(_MODEL_WIDTH)
    runs: dict[str, _Run] = {
        "ours": lambda x, w: (rms_norm(x, w, eps=_EPS, backend=Backend.TRITON),),
        "torch": lambda x, w: (rms_norm(x, w, eps=_EPS, backend=Backend.TORCH),),
        "aten": lambda x, w: (F.rms_norm(x, w.shape, w, _EPS),),
    }
    if find_spec("fla"):
        norm = import_module("fla.modules.layernorm").rms_norm
        runs["fla"] = lambda x, w: (norm(x, w, None, eps=_EPS),)
    return inputs, runs


def _gated_runs(
    case: ConvNormCase, normal: Callable[..., Tensor]
) -> tuple[_Outputs, Mapping[str, _Run]]:
    shape = (case.B, case.T, case.H, WIDTH)
    inputs = normal(*shape), normal(*shape), normal(WIDTH)
    runs: dict[str, _Run] = {
        "ours": lambda x, g, w: (gated_rms_norm(x, g, w, eps=_EPS, backend=Backend.TRITON),),
        "torch": lambda x, g, w: (gated_rms_norm(x, g, w, eps=_EPS, backend=Backend.TORCH),),
    }
    if find_spec("fla"):
        norm = import_module("fla.modules.fused_norm_gate").rms_norm_gated
        options = {"activation": "sigmoid", "eps": _EPS}
        runs["fla"] = lambda x, g, w: (norm(x, g, w, None, **options),)
    return inputs, runs


def _l2_runs(
    case: ConvNormCase, normal: Callable[..., Tensor]
) -> tuple[_Outputs, Mapping[str, _Run]]:
    inputs = (normal(case.B, case.T, case.H, WIDTH),)
    runs: dict[str, _Run] = {
        "ours": lambda x: (l2_norm(x, backend=Backend.TRITON),),
        "torch": lambda x: (l2_norm(x, backend=Backend.TORCH),),
    }
    if find_spec("fla"):
        norm = import_module("fla.modules.l2norm").l2norm
        runs["fla"] = lambda x: (norm(x),)
    return inputs, runs


def _call(case: ConvNormCase, run: _Run, inputs: _Outputs) -> Call:
    """Return the call to be timed: forward alone, or with the gradients of all inputs."""
    if case.work is not Work.TRAINING:

        def forward() -> object:
            with torch.no_grad():
                return run(*inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        outputs = run(*inputs)
    generator = torch.Generator(inputs[0].device).manual_seed(1)  # the same for every peer
    d_outputs = [
        torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype) for y in outputs
    ]

    def both() -> object:
        return torch.autograd.grad(run(*leaves), leaves, d_outputs)

    return both
