"""Run one parameter set of FLA's tests through several implementations, and compare with fp64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from kimi_convert.bench.fla_adapter import (
    FlaOptions,
    KdaFunction,
    Ours,
    Results,
    gate_of,
    oracle,
)
from kimi_convert.bench.fla_case import Beta, FlaCase, Form
from kimi_convert.kernels.backend import Backend

OURS, TRITON, FLA = "ours", "triton", "fla"

# What FLA's tests call equal, however large the relative error.
_NOTHING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One result of one implementation."""

    case: str
    who: str
    result: str  # "o", "ht", or "d" and what it is the gradient of
    against: str  # "fp64", or "twin": the same call said in another way
    error: float  # root mean square, relative to that of what is expected
    allowed: float
    passed: bool
    counts: bool  # FLA's test only warns where it does not


def run_case(case: FlaCase, device: torch.device, *, with_fla: bool) -> list[Comparison]:
    """Compare our functions, and FLA's own if asked for, with the recurrence in fp64.

    On a CPU our kernels run in Triton's interpreter.
    """
    inputs = _draw(case, device)
    if case.form is Form.GATE:
        return _compare_gate(case, inputs, with_fla=with_fla)
    functions = _our_functions(case, device)
    if with_fla:
        functions[FLA] = _fla_function(case)
    expected = _results(case, inputs, oracle)
    found = {who: _results(case, inputs, function) for who, function in functions.items()}
    rows = [row for who, one in found.items() for row in _against_fp64(case, who, one, expected)]
    twin = case.twin
    if twin is not None and case.against_twin is not None:
        others = _results(twin, inputs, functions[OURS])
        for name, other in others.items():
            rows.append(_compare(case, OURS, name, found[OURS][name], other, twin=True))
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """As FLA's tests draw them; q and k before their norm."""

    q: Tensor  # [B, T, H, D]
    k: Tensor
    v: Tensor  # [B, T, HV, D]
    g: Tensor  # [B, T, HV, D], log decays or what the gate's law is of
    beta: Tensor  # [B, T, HV], logits unless they are given as write strengths
    state: Tensor  # [N, HV, D, D] fp32
    A_log: Tensor | None
    dt_bias: Tensor | None  # [HV D]
    cu_seqlens: Tensor | None
    d_output: Tensor
    d_state: Tensor

    def leaves(self, *, gradients: bool) -> dict[str, Tensor]:
        """Return what gradients are asked of, by FLA's short names."""
        named = {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "g": self.g,
            "b": self.beta,
            "h0": self.state,
            "A": self.A_log,
            "bias": self.dt_bias,
        }
        return {
            name: x.detach().requires_grad_(gradients)
            for name, x in named.items()
            if x is not None
        }


def _draw(case: FlaCase, device: torch.device) -> _Inputs:
    """Draw inputs, the same each time on one kind of device."""
    B, T, H, HV, D = case.shape
    generator = torch.Generator(device).manual_seed(42)
    dtype: torch.dtype = getattr(torch, case.dtype)
    N = len(case.offsets) - 1 if case.offsets else B

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    draw = normal if case.normal else uniform
    q, k, v = (draw(B, T, heads, D) for heads in (H, H, HV))
    if case.normal and not case.qk_norm:
        k = normalize(k, dim=-1)
    g = case.spread * normal(B, T, HV, D)
    if not case.fused_gate:
        g = logsigmoid(g) / case.normalizer
        g = g * (uniform(B, T, HV, D) >= case.zeroed)
    g = g.where(uniform(B, T, HV, D) >= case.drowned, torch.full_like(g, -1000))
    g = g.clamp(-5, 0) if case.clamped else g
    beta = normal(B, T, HV)
    rates = normal(HV) if case.normal_rates else (1 + 15 * uniform(HV)).log()
    return _Inputs(
        q=q.to(dtype),
        k=k.to(dtype),
        v=v.to(dtype),
        g=g.to(dtype) if case.fused_gate else g,
        beta=(beta.sigmoid() if case.beta is Beta.GIVEN else beta).to(dtype),
        state=normal(N, HV, D, D),
        A_log=rates if case.fused_gate and case.has_rates else None,
        dt_bias=normal(HV * D) if case.fused_gate and case.has_bias else None,
        cu_seqlens=torch.tensor(case.offsets, device=device) if case.offsets else None,
        d_output=normal(B, T, HV, D, dtype=dtype),
        d_state=normal(N, HV, D, D),
    )


def _results(case: FlaCase, inputs: _Inputs, function: KdaFunction) -> dict[str, Tensor]:
    """Return output, final state and, where the case asks for them, gradients."""
    leaves = inputs.leaves(gradients=case.gradients)
    with torch.set_grad_enabled(case.gradients):
        output, state = _call(case, inputs, leaves, function)
        assert state is not None
        found = {"o": output.detach(), "ht": state.detach()}
        if case.gradients:
            seeds = (inputs.d_output.to(output.dtype), inputs.d_state.to(state.dtype))
            gradients = torch.autograd.grad((output, state), list(leaves.values()), seeds)
            found |= {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}
    return found


def _call(
    case: FlaCase, inputs: _Inputs, leaves: Mapping[str, Tensor], function: KdaFunction
) -> Results:
    """Do before the call what the function shall not; return the state as [K, V]."""
    q, k, beta, state = (leaves[name] for name in ("q", "k", "b", "h0"))
    if not case.qk_norm:
        q = normalize(q, dim=-1)
        k = k if case.normal else normalize(k, dim=-1)
    if case.beta is Beta.OUTSIDE:
        beta = beta.float().sigmoid() * (2 if case.doubled_beta else 1)
    options = FlaOptions(
        scale=case.scale,
        initial_state=state.mT.contiguous() if case.state_v_first else state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=case.qk_norm,
        use_gate_in_kernel=case.fused_gate,
        use_beta_sigmoid_in_kernel=case.beta is Beta.INSIDE,
        allow_neg_eigval=case.beta is Beta.INSIDE and case.doubled_beta,
        lower_bound=case.lower_bound,
        A_log=leaves.get("A"),
        dt_bias=leaves.get("bias"),
        state_v_first=case.state_v_first,
        cu_seqlens=inputs.cu_seqlens,
    )
    output, last = function(q, k, leaves["v"], leaves["g"], beta, options)
    return output, last.mT if last is not None and case.state_v_first else last


def _our_functions(case: FlaCase, device: torch.device) -> dict[str, KdaFunction]:
    """Return ours as it is chosen on a GPU, and Triton alone where that may be something else."""
    recurrent = case.form is not Form.CHUNK
    triton = Ours(recurrent=recurrent, backend=Backend.TRITON)
    if recurrent or device.type == "cpu":
        return {OURS: triton}
    functions: dict[str, KdaFunction] = {OURS: Ours(recurrent=False, backend=None)}
    if case.dtype == "bfloat16":  # which has stages in CUDA C++
        functions[TRITON] = triton
    return functions


def _fla_function(case: FlaCase) -> KdaFunction:
    """Return flash-linear-attention's own function."""
    ops = import_module("fla.ops.kda")
    form = ops.chunk_kda if case.form is Form.CHUNK else ops.fused_recurrent_kda

    def call(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: FlaOptions
    ) -> Results:
        given = {field.name: getattr(options, field.name) for field in fields(options)}
        if case.form is Form.CHUNK:
            given["safe_gate"] = case.clamped or case.lower_bound is not None
        return form(q, k, v, g, beta, **given)

    return call


def _compare_gate(case: FlaCase, inputs: _Inputs, *, with_fla: bool) -> list[Comparison]:
    """Compare the gate's law alone, forward and backward."""

    def results(law: Any, dtype: torch.dtype) -> dict[str, Tensor]:  # noqa: ANN401  (FLA's or ours)
        leaves = {
            name: leaf
            for name, leaf in inputs.leaves(gradients=True).items()
            if name in ("g", "A", "bias")
        }
        wide = {name: leaf.to(dtype) for name, leaf in leaves.items()}
        g = law(wide["g"], wide.get("A"), wide.get("bias"))
        gradients = torch.autograd.grad((g * inputs.d_output).sum(), list(leaves.values()))
        named = {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}
        return {"o": g.detach(), **named}

    def ours(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
        options = FlaOptions(A_log=A_log, dt_bias=dt_bias, lower_bound=case.lower_bound)
        return gate_of(options, g).log_decay(g)

    found = {OURS: results(ours, torch.float32)}
    if with_fla:
        law = import_module("fla.ops.kda.gate").fused_kda_gate
        options = {"lower_bound": case.lower_bound}
        found[FLA] = results(
            lambda g, A_log, dt_bias: law(g, A_log, dt_bias=dt_bias, **options), torch.float32
        )
    expected = results(ours, torch.float64)
    return [row for who, one in found.items() for row in _against_fp64(case, who, one, expected)]


def _against_fp64(
    case: FlaCase, who: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> list[Comparison]:
    return [
        _compare(case, who, name, found[name], expected[name], twin=False) for name in expected
    ]


def _compare(
    case: FlaCase, who: str, name: str, found: Tensor, expected: Tensor, *, twin: bool
) -> Comparison:
    difference = (found.double() - expected.double()).abs()
    error = float(_rms(difference) / (_rms(expected.double()) + 1e-8))
    allowed = case.allowed.errors[name]
    if twin:
        assert case.against_twin is not None
        allowed = case.against_twin
    # A NaN is in no comparison true.
    passed = bool(difference.max() <= _NOTHING) or error < allowed
    return Comparison(
        case=case.name,
        who=who,
        result=name,
        against="twin" if twin else "fp64",
        error=error,
        allowed=allowed,
        passed=passed,
        counts=who != FLA and name not in case.allowed.only_warned_of,
    )


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
