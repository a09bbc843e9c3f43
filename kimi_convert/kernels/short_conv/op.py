"""The public short convolutions: check the arguments, choose the backend, run one of the forms."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.backend import Backend, resolve_backend
from kimi_convert.kernels.checks import expect, expect_dtype, expect_precision
from kimi_convert.kernels.packing import check_packed
from kimi_convert.kernels.short_conv.call import Call, Convolved, Stream
from kimi_convert.kernels.short_conv.reference import (
    packed_short_conv_reference,
    short_conv_reference,
)

Triple = tuple[Tensor, Tensor, Tensor]  # of q, k and v
States = tuple[Tensor | None, Tensor | None, Tensor | None]

_TRITON_TAPS = 8  # what the registers of a thread hold rows for


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute y_t = silu(sum_w weight[:, 0, w] * x_{t - (W - 1) + w}) per channel.

    Tap W - 1 multiplies the current token. bf16, fp16 and fp32 compute in fp32 and round
    once, after SiLU; fp64 computes in fp64.

    Args:
        x: [B, T, P]. Inputs; T may be 0 and may be below W - 1. Rows may lie apart.
        weight: [P, 1, W].
        state: [N, P, W - 1] in x's dtype. The inputs before x, oldest first; zeros if None. N is
            B, or the number of packed sequences.
        cu_seqlens: [N + 1] int32 | int64. Where B is 1, T holds N sequences one after another:
            the n-th has the tokens cu_seqlens[n] to cu_seqlens[n + 1], and may be empty.
        backend: "torch" or "triton"; None takes Triton on a GPU.

    Returns:
        y [B, T, P] in x's dtype and the new state [N, P, W - 1], which shares no memory with
        x or state.

    Raises:
        KernelInputError: A shape, dtype or device does not fit.

    Source: Kimi Linear report, arXiv 2510.26692, section 4.
    """
    names = (("x", "weight", "state"),)
    streams = (Stream(x, weight, state),)
    call = _checked("short_conv", names, streams, cu_seqlens)
    (result,) = _run("short_conv", call, backend)
    return result.y, result.state


def short_conv_qkv(
    inputs: Triple,
    weights: Triple,
    *,
    states: States | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend | str | None = None,
) -> tuple[Triple, Triple]:
    """Convolve q, k and v, on Triton in one launch; see `short_conv`.

    Args:
        inputs: [B, T, P] each; widths may differ. Rows may be slices of a merged projection.
        weights: [P, 1, W] each, W the same.
        states: [N, P, W - 1] each, in the dtype of its input; zeros where None.
        cu_seqlens: [N + 1] int32 | int64, as for `short_conv`.
        backend: "torch" or "triton"; None takes Triton on a GPU.

    Returns:
        The outputs [B, T, P] and the new states [N, P, W - 1].

    Raises:
        KernelInputError: A shape, dtype or device does not fit.
    """
    call = _checked_qkv("short_conv_qkv", inputs, weights, states, cu_seqlens)
    q, k, v = _run("short_conv_qkv", call, backend)
    return (q.y, k.y, v.y), (q.state, k.state, v.state)


@torch.no_grad()
def short_conv_qkv_(
    inputs: Triple, weights: Triple, states: Triple, *, backend: Backend | str | None = None
) -> Triple:
    """Do as `short_conv_qkv`, and write the new states over the old ones: for decode.

    No gradient flows. On Triton, up to 16 tokens of a sequence take one launch, which waits for
    nothing and allocates the outputs alone, so a CUDA graph can hold it.

    Args:
        inputs: [B, T, P] each.
        weights: [P, 1, W] each.
        states: [B, P, W - 1] each, in the dtype of its input, contiguous. Written over.
        backend: "torch" or "triton"; None takes Triton on a GPU.

    Returns:
        The outputs [B, T, P].

    Raises:
        KernelInputError: A shape, dtype or device does not fit, or a state is not contiguous.
    """
    where = "short_conv_qkv_"
    call = _checked_qkv(where, inputs, weights, states, None)
    for n, state in enumerate(states):
        _expect_contiguous(where, f"states[{n}]", state)
    if call.T and call.N and _backend(where, call, backend) is Backend.TRITON:
        from kimi_convert.kernels.short_conv.kernel import BLOCK_TOKENS, short_conv_forward_

        if call.T <= BLOCK_TOKENS:
            q, k, v = (y for part in call.launches() for y in short_conv_forward_(part))
            return q, k, v
    results = _run(where, call, backend)
    for state, result in zip(states, results, strict=True):
        state.copy_(result.state)
    q, k, v = (result.y for result in results)
    return q, k, v


def _checked_qkv(
    where: str,
    inputs: Triple,
    weights: Triple,
    states: States | None,
    cu_seqlens: Tensor | None,
) -> Call:
    given = {"inputs": inputs, "weights": weights, "states": states or (None, None, None)}
    for name, tensors in given.items():
        if len(tensors) != 3:
            raise KernelInputError(
                f"{name} does not fit",
                where=where,
                expected="three tensors, of q, k and v",
                found=len(tensors),
            )
    names = tuple((f"inputs[{n}]", f"weights[{n}]", f"states[{n}]") for n in range(3))
    streams = tuple(Stream(*of_one) for of_one in zip(*given.values(), strict=True))
    return _checked(where, names, streams, cu_seqlens)


def _checked(
    where: str,
    names: tuple[tuple[str, str, str], ...],
    streams: tuple[Stream, ...],
    cu_seqlens: Tensor | None,
) -> Call:
    """Check one or more streams of the same tokens; `names` are those of their tensors."""
    specs: dict[str, tuple[Tensor, str]] = {}
    for n, ((x_name, weight_name, _), stream) in enumerate(zip(names, streams, strict=True)):
        P = f"P{n}" if n else "P"
        specs[x_name] = (stream.x, f"B T {P}")
        specs[weight_name] = (stream.weight, f"{P} 1 W")
    sizes = expect(where, **specs)
    dtype = expect_precision(where, **{name: tensor for name, (tensor, _) in specs.items()})
    N = sizes["B"]
    if cu_seqlens is not None:
        cu_seqlens = check_packed(where, cu_seqlens, rows=sizes["B"], length=sizes["T"]).to(
            streams[0].x.device
        )
        N = len(cu_seqlens) - 1
    _check_states(where, names, streams, N=N, W=sizes["W"])
    return Call(streams=streams, cu_seqlens=cu_seqlens, N=N, dtype=dtype)


def _check_states(
    where: str,
    names: tuple[tuple[str, str, str], ...],
    streams: tuple[Stream, ...],
    *,
    N: int,
    W: int,
) -> None:
    # In one go: a call for each would take longer than the launch.
    specs = {names[0][0]: (streams[0].x, "B T P")}  # whose device all must share
    for (_, _, name), stream in zip(names, streams, strict=True):
        if stream.state is not None:
            specs[name] = (stream.state, f"{N} {stream.x.shape[2]} {W - 1}")
    expect(where, **specs)
    for (_, _, name), stream in zip(names, streams, strict=True):
        if stream.state is not None:
            expect_dtype(where, stream.x.dtype, **{name: stream.state})


def _run(where: str, call: Call, backend: Backend | str | None) -> tuple[Convolved, ...]:
    chosen = _backend(where, call, backend)
    if chosen is Backend.TRITON and call.T and call.N:
        from kimi_convert.kernels.short_conv.autograd import short_conv_triton

        return tuple(result for part in call.launches() for result in short_conv_triton(part))
    return tuple(_in_torch(call, stream) for stream in call.streams)


def _in_torch(call: Call, stream: Stream) -> Convolved:
    x, weight, state = stream
    if state is None:
        state = x.new_zeros(call.N, x.shape[2], call.W - 1)
    if call.cu_seqlens is None:
        return Convolved(*short_conv_reference(x, weight, state=state, dtype=call.dtype))
    return Convolved(
        *packed_short_conv_reference(
            x, weight, state=state, dtype=call.dtype, cu_seqlens=call.cu_seqlens
        )
    )


def _backend(where: str, call: Call, backend: Backend | str | None) -> Backend:
    """Return what runs; Triton is refused where it is asked for and cannot."""
    chosen = resolve_backend(backend, where=where, device=call.device, dtype=call.dtype)
    if chosen is Backend.TORCH or call.W <= _TRITON_TAPS:
        return chosen
    if backend is None:
        return Backend.TORCH
    raise KernelInputError(
        "the convolution is too wide for Triton",
        where=where,
        expected=f"weights of at most {_TRITON_TAPS} taps",
        found=call.W,
        hint='Pass backend="torch", or None to let the call decide.',
    )


def _expect_contiguous(where: str, name: str, state: Tensor) -> None:
    if not isinstance(state, Tensor) or not state.is_contiguous():
        found = getattr(state, "stride", lambda: type(state).__name__)()
        raise KernelInputError(
            f"{name} cannot be written to",
            where=where,
            expected="a contiguous tensor",
            found=found,
            hint=f"Pass {name} as torch.empty makes it.",
        )
