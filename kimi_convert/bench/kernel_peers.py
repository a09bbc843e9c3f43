"""Whose KDA is timed: ours as chosen by itself, on Triton alone, in torch; flash-linear-attention's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kimi_convert.bench.kernel_cases import Case, Inputs, Work
from kimi_convert.kernels.backend import Backend
from kimi_convert.kernels.kda import chunk_kda, recurrent_kda

Call = Callable[[], object]
_TORCH_TOKENS = 8192  # plain torch takes seconds for more


def peers(case: Case, inputs: Inputs) -> Mapping[str, Call]:
    """Return a call for each implementation that serves the case here."""
    calls: dict[str, Call] = {}
    if inputs.q.is_cuda:
        decodes = case.work is Work.DECODE  # which exists on Triton alone
        calls["ours"] = _ours(case, inputs, Backend.TRITON if decodes else None)
        if not decodes:
            calls["triton"] = _ours(case, inputs, Backend.TRITON)
    if case.B * case.T <= _TORCH_TOKENS:
        calls["torch"] = _ours(case, inputs, Backend.TORCH)
    if inputs.q.is_cuda and find_spec("fla"):
        calls["fla"] = _fla(case, inputs)
    return calls


def _ours(case: Case, inputs: Inputs, backend: Backend | None) -> Call:
    options: dict[str, Any] = {"qk_norm": True, "beta_logits": True, "backend": backend}
    form = recurrent_kda if case.work is Work.DECODE else chunk_kda
    if case.work is Work.DECODE:
        options["initial_state"] = inputs.state

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return form(*tensors, gate=inputs.gate, **options)

    return _call(case, inputs, run)


def _fla(case: Case, inputs: Inputs) -> Call:
    ops = import_module("fla.ops.kda")
    options: dict[str, Any] = {
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "A_log": inputs.gate.A_log,
        "dt_bias": inputs.gate.dt_bias.flatten(),
    }
    if inputs.gate.lower_bound is not None:
        options["lower_bound"] = inputs.gate.lower_bound
    if case.work is Work.DECODE:
        form = ops.fused_recurrent_kda
        options["initial_state"] = inputs.state
    else:
        form = ops.chunk_kda
        options["safe_gate"] = inputs.gate.lower_bound is not None

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return form(*tensors, **options)

    return _call(case, inputs, run)


def _call(case: Case, inputs: Inputs, run: Callable[..., tuple[Tensor, Tensor]]) -> Call:
    """Return the call to be timed: forward alone, or with the gradients of its five inputs."""
    if case.work is not Work.TRAINING:

        def forward() -> object:
            with torch.no_grad():
                return run(*inputs.tensors())

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs.tensors()]

    def both() -> object:
        output, _ = run(*leaves)
        return torch.autograd.grad(output, leaves, inputs.d_output)

    return both
