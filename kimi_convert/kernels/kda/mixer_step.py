"""The public decode step of a whole KDA mixer: check the arguments, run it in torch or on Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.backend import Backend, launching_on, resolve_backend
from kimi_convert.kernels.checks import expect_dtype, expect_precision
from kimi_convert.kernels.kda.gate import Gate
from kimi_convert.kernels.kda.mixer_step_reference import MixerStep, kda_mixer_step_reference_
from kimi_convert.kernels.kda.target import check_target

_WHERE = "kda_mixer_step_"
_TRITON_WIDTHS = 256  # of a key or a value: what fits into a multiprocessor


@torch.no_grad()
def kda_mixer_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    b: Tensor,
    *,
    output_gate: Tensor,
    conv_weights: tuple[Tensor, Tensor, Tensor],
    conv_states: tuple[Tensor, Tensor, Tensor],
    state: Tensor,
    gate: Gate,
    norm_weight: Tensor,
    norm_eps: float,
    output: Tensor | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """Take a KDA mixer one token further, from its projections of x to what its last one reads.

    Writes over `conv_states`, `state` and `output`. On Triton it is one launch, which allocates
    nothing if `output` is given and waits for nothing, so a CUDA graph can hold it. No gradient
    flows. bf16, fp16 and fp32 compute in fp32, fp64 in fp64.

    Args:
        q: [B, H K]. Projection of the token, before the convolution. The rows of this and the
            next five may lie apart, as in slices of a merged projection.
        k: [B, H K], likewise.
        v: [B, H V], likewise.
        f: [B, H K]. Projection for the gate law, without bias.
        b: [B, H]. Write strength before the sigmoid.
        output_gate: [B, H V]. Logits of the gate after the norm.
        conv_weights: [H K, 1, W], [H K, 1, W] and [H V, 1, W].
        conv_states: [B, H K, W - 1], [B, H K, W - 1] and [B, H V, W - 1] in the dtypes of q, k
            and v, contiguous. The inputs before this one, oldest first.
        state: [B, H, K, V] fp32 (fp64 for fp64 inputs), contiguous.
        gate: A_log [H], dt_bias [H, K].
        norm_weight: [V]. Shared by the heads.
        norm_eps: Added to the mean square of a head's output.
        output: [B, H V] in v's dtype, contiguous; allocated if None.
        backend: "torch" or "triton"; None takes Triton on a GPU.

    Returns:
        output.

    Raises:
        KernelInputError: A shape, dtype or device does not fit.

    Source: Kimi Linear report, arXiv 2510.26692, sections 3 and 4.
    """
    if output is None:
        output = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    step = MixerStep(
        *(q, k, v, f, b, output_gate),
        conv_weights=conv_weights,
        conv_states=conv_states,
        state=state,
        gate=gate,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        output=output,
    )
    dtype = _check(step)
    if state.shape[0] == 0:
        return output
    if _backend(step, backend, dtype) is Backend.TORCH:
        kda_mixer_step_reference_(step)
    else:
        from kimi_convert.kernels.kda.mixer_step_kernel import run_mixer_step

        with launching_on(state.device):
            run_mixer_step(step)
    return output


def _check(step: MixerStep) -> torch.dtype:
    """Refuse what does not fit; return the dtype to compute in."""
    _check_rank("state", step.state, "[B, H, K, V]", rank=4)
    if (len(step.conv_weights), len(step.conv_states)) != (3, 3):
        found = (len(step.conv_weights), len(step.conv_states))
        raise _wrong("conv_weights or conv_states", "one each of q, k and v", found)
    _check_rank("conv_weights[0]", step.conv_weights[0], "[H K, 1, W]", rank=3)
    W = step.conv_weights[0].shape[2]
    tensors = _tensors_and_shapes(step, W)
    device = step.state.device
    # `expect` would do, but takes longer than the launch.
    for name, (tensor, shape) in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.device != device:
            raise _wrong(name, f"{list(shape)} on {device}", _describe(tensor))
    dtype = expect_precision(_WHERE, **{name: tensor for name, (tensor, _) in tensors.items()})
    expect_dtype(_WHERE, dtype, state=step.state)
    _check_targets(step, W)
    return dtype


def _tensors_and_shapes(step: MixerStep, W: int) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Return what is read only, by name, and the shapes that the state asks for."""
    B, H, K, V = step.state.shape
    q_weight, k_weight, v_weight = step.conv_weights
    return {
        "q": (step.q, (B, H * K)),
        "k": (step.k, (B, H * K)),
        "v": (step.v, (B, H * V)),
        "f": (step.f, (B, H * K)),
        "b": (step.b, (B, H)),
        "output_gate": (step.output_gate, (B, H * V)),
        "conv_weights[0]": (q_weight, (H * K, 1, W)),
        "conv_weights[1]": (k_weight, (H * K, 1, W)),
        "conv_weights[2]": (v_weight, (H * V, 1, W)),
        "A_log": (step.gate.A_log, (H,)),
        "dt_bias": (step.gate.dt_bias, (H, K)),
        "norm_weight": (step.norm_weight, (V,)),
    }


def _check_targets(step: MixerStep, W: int) -> None:
    """Refuse states and an output that cannot be written as they are."""
    device = step.state.device
    targets = {
        "conv_states[0]": (step.conv_states[0], (*step.q.shape, W - 1), step.q.dtype),
        "conv_states[1]": (step.conv_states[1], (*step.k.shape, W - 1), step.k.dtype),
        "conv_states[2]": (step.conv_states[2], (*step.v.shape, W - 1), step.v.dtype),
        "state": (step.state, step.state.shape, step.state.dtype),
        "output": (step.output, step.v.shape, step.v.dtype),
    }
    for name, (tensor, shape, dtype) in targets.items():
        check_target(_WHERE, name, tensor, shape=shape, dtype=dtype, device=device)


def _check_rank(name: str, tensor: Tensor, expected: str, *, rank: int) -> None:
    """Refuse what has not so many dims, or, except for B, empty ones."""
    if not isinstance(tensor, Tensor) or tensor.ndim != rank or 0 in tensor.shape[1:]:
        raise _wrong(name, f"{expected} with every size above 0 except B", _describe(tensor))


def _backend(step: MixerStep, backend: Backend | str | None, dtype: torch.dtype) -> Backend:
    chosen = resolve_backend(backend, where=_WHERE, device=step.state.device, dtype=dtype)
    if chosen is Backend.TORCH or max(step.state.shape[2:]) <= _TRITON_WIDTHS:
        return chosen
    if backend is None:
        return Backend.TORCH
    found = list(step.state.shape)
    raise _wrong("state", f"K and V of at most {_TRITON_WIDTHS} for Triton", found)


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{list(value.shape)} on {value.device}"


def _wrong(name: str, expected: object, found: object) -> KernelInputError:
    return KernelInputError(
        f"{name} does not fit",
        where=_WHERE,
        expected=expected,
        found=found,
        hint="Shapes follow from those of state, [B, H, K, V], and of the convolution, W.",
    )
