"""The Triton short convolution, joined to autograd: the forward pass keeps its inputs alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_convert.kernels.short_conv.backward import short_conv_backward
from kimi_convert.kernels.short_conv.call import Call, Convolved, Stream
from kimi_convert.kernels.short_conv.kernel import short_conv_forward


def short_conv_triton(call: Call) -> tuple[Convolved, ...]:
    """Run a checked call for one launch, with at least one token."""
    if not call.needs_grad:
        return short_conv_forward(call)
    flat = _ShortConv.apply(call, *(tensor for stream in call.streams for tensor in stream))
    return tuple(Convolved(*flat[n : n + 2]) for n in range(0, len(flat), 2))


class _ShortConv(torch.autograd.Function):
    """Tensors come and go one after another: x, weight and state, or y and state, of each stream."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (autograd's)
        call: Call,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Run the kernel."""
        ctx.save_for_backward(*tensors)
        ctx.call = replace(call, streams=())
        ctx.set_materialize_grads(False)
        results = short_conv_forward(replace(call, streams=_streams(tensors)))
        return tuple(tensor for result in results for tensor in result)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (once_differentiable)
        ctx: Any,  # noqa: ANN401  (autograd's)
        *gradients: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Compute z again, then backwards; a result that nothing came from has a gradient of 0."""
        call = replace(ctx.call, streams=_streams(ctx.saved_tensors))
        d_ys = tuple(
            torch.zeros_like(stream.x) if d_y is None else d_y
            for stream, d_y in zip(call.streams, gradients[0::2], strict=True)
        )
        d_states: tuple[Tensor, ...] | None = None
        if any(d_state is not None for d_state in gradients[1::2]):
            d_states = tuple(
                stream.x.new_zeros(call.N, stream.x.shape[2], call.W - 1)
                if d_state is None
                else d_state
                for stream, d_state in zip(call.streams, gradients[1::2], strict=True)
            )
        found = short_conv_backward(call, d_ys, d_states)
        return (None, *(gradient for of_stream in found for gradient in of_stream))


def _streams(tensors: tuple[Any, ...]) -> tuple[Stream, ...]:
    return tuple(Stream(*tensors[n : n + 3]) for n in range(0, len(tensors), 3))
