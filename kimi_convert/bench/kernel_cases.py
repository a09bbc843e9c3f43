"""The calls of KDA that are timed, their inputs, and the bytes that each must move at least."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from kimi_convert.kernels.kda import Gate

WIDTH = 128  # of keys and values, in every released model
_BOUND = -5.0  # natural log decay, as released models have it


class Work(StrEnum):
    """What is timed."""

    PREFILL = "prefill"  # forward, all fused, with the final state
    TRAINING = "training"  # forward and backward
    DECODE = "decode"  # one token, state updated


class GateKind(StrEnum):
    """How the gates are drawn."""

    INITIAL = "initial"  # as an untrained layer has them: rates of 1 to 16, steps of 0.001 to 0.1
    STEEP = (
        "steep"  # the same rates, steps of about 1: far stronger decays than a layer starts with
    )
    BOUNDED = "bounded"  # the bounded law, over its whole range


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call."""

    work: Work
    B: int
    T: int
    H: int = 32
    gates: GateKind = GateKind.INITIAL

    @property
    def name(self) -> str:
        """A short name."""
        return f"{self.work} B={self.B} T={self.T} H={self.H} {self.gates}"

    @property
    def floor_bytes(self) -> int:
        """Bytes of every input read once and every result written once; gradients likewise."""
        rows = self.B * self.T * self.H
        inputs = rows * (4 * WIDTH + 1) * 2
        output = rows * WIDTH * 2
        state = self.B * self.H * WIDTH * WIDTH * 4
        match self.work:
            case Work.PREFILL:
                return inputs + output + state
            case Work.TRAINING:
                return (inputs + output + state) + (inputs + output) + inputs
            case Work.DECODE:
                return inputs + output + 2 * state


CASES = (
    Case(work=Work.PREFILL, B=1, T=1024),
    Case(work=Work.PREFILL, B=8, T=1024),
    Case(work=Work.PREFILL, B=1, T=8192),
    Case(work=Work.PREFILL, B=1, T=65536),
    Case(work=Work.PREFILL, B=1, T=65536, gates=GateKind.STEEP),
    Case(work=Work.PREFILL, B=1, T=65536, gates=GateKind.BOUNDED),
    Case(work=Work.TRAINING, B=1, T=8192),
    Case(work=Work.DECODE, B=1, T=1),
    Case(work=Work.DECODE, B=64, T=1),
    Case(work=Work.DECODE, B=256, T=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """bf16 tensors of a case; gate parameters and state fp32."""

    q: Tensor  # [B, T, H, K]
    k: Tensor
    v: Tensor
    f: Tensor
    beta: Tensor  # [B, T, H] logits
    gate: Gate
    state: Tensor  # [B, H, K, V]
    d_output: Tensor  # [B, T, H, V]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v, f and beta."""
        return self.q, self.k, self.v, self.f, self.beta


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the inputs of a case, the same each time."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.B, case.T, case.H, WIDTH)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator, device=device)

    f, A_log = normal(*shape), uniform(1, 16, case.H).log()
    dt_bias = normal(case.H, WIDTH).float()
    if case.gates is GateKind.INITIAL:
        f *= 0.02
        step = uniform(-6.9, -2.3, case.H, WIDTH).exp()
        dt_bias = step + torch.log(-torch.expm1(-step))  # softplus of it is the step
    bound = _BOUND if case.gates is GateKind.BOUNDED else None
    if bound is not None:
        A_log = torch.zeros_like(A_log)
    return Inputs(
        q=normal(*shape),
        k=normal(*shape),
        v=normal(*shape),
        f=f,
        beta=normal(*shape[:3]),
        gate=Gate(A_log=A_log, dt_bias=dt_bias, lower_bound=bound),
        state=uniform(-1, 1, case.B, case.H, WIDTH, WIDTH),
        d_output=normal(*shape),
    )
