"""The short convolution of KDA: causal, depthwise, without bias, followed by SiLU.

One function serves prefill, chunked prefill and single steps: it takes the last inputs of
what came before and returns the last inputs of what it was given.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from kimi_convert.kernels.checks import expect, expect_dtype, expect_precision

# Elements of x worked on at once, so that the W passes stay in cache. B=1 T=2048 P=2048 fp32 on
# one core of an AMD EPYC (Zen 5): 11 ms, without segments 28 ms, with torch's conv1d 31 ms.
SEGMENT_ELEMENTS = 2**18


def short_conv(x: Tensor, weight: Tensor, *, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute y_t = silu(sum_w weight[:, 0, w] * x_{t - (W - 1) + w}) per channel.

    Tap W - 1 multiplies the current token. bf16, fp16 and fp32 compute in fp32 and round
    once, after SiLU; fp64 computes in fp64.

    Args:
        x: [B, T, P]. Inputs; T may be 0 and may be below W - 1.
        weight: [P, 1, W].
        state: [B, P, W - 1] in x's dtype. The inputs before x, oldest first; zeros if None.

    Returns:
        y [B, T, P] in x's dtype and the new state [B, P, W - 1], which shares no memory with
        x or state.

    Raises:
        KernelInputError: A shape, dtype or device does not fit.

    Source: Kimi Linear report, arXiv 2510.26692, section 4.
    """
    dims = expect("short_conv", x=(x, "B T P"), weight=(weight, "P 1 W"))
    batch, channels, width = dims["B"], dims["P"], dims["W"]
    dtype = expect_precision("short_conv", x=x, weight=weight)
    if state is None:
        state = x.new_zeros(batch, channels, width - 1)
    expect("short_conv", x=(x, "B T P"), state=(state, f"B P {width - 1}"))
    expect_dtype("short_conv", x.dtype, state=state)
    past = state.mT  # [B, W - 1, P]
    taps = weight.to(dtype).squeeze(1).unbind(dim=-1)  # W of [P]
    step = max(SEGMENT_ELEMENTS // max(batch * channels, 1), 1)
    outputs: list[Tensor] = []
    for part in x.split(step, dim=1):
        window = torch.cat((past, part), dim=1)  # [B, W - 1 + part, P]
        past = window[:, part.shape[1] :]
        outputs.append(_silu_of_taps(window.to(dtype), taps).to(x.dtype))
    return torch.cat(outputs, dim=1), past.mT.clone(memory_format=torch.contiguous_format)


def _silu_of_taps(window: Tensor, taps: tuple[Tensor, ...]) -> Tensor:
    """Sum the W shifted, weighted copies of [B, W - 1 + T, P] to [B, T, P]."""
    length = window.shape[1] - len(taps) + 1
    summed = window[:, :length] * taps[0]
    for offset, tap in enumerate(taps[1:], start=1):
        summed = torch.addcmul(summed, window[:, offset : offset + length], tap)
    return silu(summed)
