"""One decode step of a whole KDA mixer, between its projections, in one launch.

    q, k, v = silu(conv(q)), silu(conv(k)), silu(conv(v))
    q, k    = q / |q|, k / |k|
    S <- diag(exp g) S;  u = sigmoid(b) (v - S^T k);  S <- S + k u^T;  o = K^-1/2 S^T q
    y       = o / sqrt(mean(o^2) + eps) * weight * sigmoid(output_gate)

`mixer_step_reference.py` says the same in torch.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from kimi_convert.kernels.kda.device import BOUNDED, SOFTPLUS, log2_decay
from kimi_convert.kernels.kda.mixer_step_reference import MixerStep
from kimi_convert.kernels.kda.problem import padded
from kimi_convert.kernels.kda.step import step_state, unit_scales

_MAX_TILE = 128  # value channels at a time, each thread holds as many values of the state


@triton.jit
def load_window(x, past, weight, channels, width, W: tl.constexpr):
    """Load the last W inputs of some channels, oldest first, and what each is multiplied with.

    Args:
        x: the newest inputs.
        past: [width, W - 1], those before.
        weight: [width, W].
        channels: from 0.
        width: channels that exist.
        W: inputs.
    """
    m_channel = channels < width
    window = ()
    taps = ()
    for w in tl.static_range(W - 1):
        window += (tl.load(past + channels * (W - 1) + w, mask=m_channel, other=0),)
    window += (tl.load(x + channels, mask=m_channel, other=0),)
    for w in tl.static_range(W):
        taps += (tl.load(weight + channels * W + w, mask=m_channel, other=0).to(tl.float32),)
    return window, taps


@triton.jit
def convolve(window, taps, W: tl.constexpr):
    """Return silu(sum of window * taps) per channel, rounded as activations are, in fp32."""
    y = window[0].to(tl.float32) * taps[0]
    for w in tl.static_range(1, W):
        y += window[w].to(tl.float32) * taps[w]
    return (y * tl.sigmoid(y)).to(window[0].dtype).to(tl.float32)


@triton.jit
def store_window(past, window, channels, width, W: tl.constexpr):
    """Keep all inputs of a window but the oldest."""
    for w in tl.static_range(W - 1):
        tl.store(past + channels * (W - 1) + w, window[w + 1], mask=channels < width)


@triton.jit
def kda_mixer_step_kernel(
    # inputs
    q,  # [B, H, K]
    k,  # [B, H, K]
    v,  # [B, H, V]
    f,  # [B, H, K]
    b,  # [B, H]
    output_gate,  # [B, H, V]
    q_weight,  # [H, K, W]
    k_weight,  # [H, K, W]
    v_weight,  # [H, V, W]
    A_log,  # [H]
    dt_bias,  # [H, K]
    norm_weight,  # [V]
    # inputs and outputs
    q_past,  # [B, H, K, W - 1]
    k_past,  # [B, H, K, W - 1]
    v_past,  # [B, H, V, W - 1]
    state,  # [B, H, K, V] fp32
    # outputs
    o,  # [B, H, V]
    # sizes
    scale,
    eps,
    lower_bound,
    # strides, from one sequence to the next
    q_row,
    k_row,
    v_row,
    f_row,
    b_row,
    gate_row,
    # meta
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    BK: tl.constexpr,  # K, padded to a power of two
    TILE_V: tl.constexpr,
    NUM_TILES: tl.constexpr,  # of V
    LAW: tl.constexpr,
):
    """Run one head of one sequence, TILE_V value channels at a time; the id is (sequence, head).

    All but rows contiguous. Each program reads and writes its own part of the states only. Lanes
    past K or V hold 0 throughout, those of gate inputs -inf. A state is loaded, by whichever
    threads, before a barrier and stored after it.
    """
    DTYPE: tl.constexpr = o.dtype.element_ty
    i_b = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    i_bh = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, TILE_V)
    q_past += i_bh * K * (W - 1)
    k_past += i_bh * K * (W - 1)
    v_past += i_bh * V * (W - 1)
    v += i_b * v_row + i_h * V
    v_weight += i_h * V * W
    state += i_bh * K * V
    p_state = o_k[:, None] * V + o_v[None, :]
    b_state = tl.load(state + p_state, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0)
    v_window, v_taps = load_window(v, v_past, v_weight, o_v, V, W)
    p_all = tl.arange(0, NUM_TILES)[:, None] * TILE_V + o_v[None, :]
    b_gate = tl.load(output_gate + i_b * gate_row + i_h * V + p_all, mask=p_all < V, other=0)
    b_norm = tl.load(norm_weight + p_all, mask=p_all < V, other=0).to(tl.float32)
    b_beta = tl.sigmoid(tl.load(b + i_b * b_row + i_h).to(tl.float32))
    rate = tl.exp(tl.load(A_log + i_h).to(tl.float32))
    bias = tl.load(dt_bias + i_h * K + o_k, mask=o_k < K, other=0).to(tl.float32)
    # What is needed first is loaded last, so that no load waits until another has arrived: left to
    # itself, the compiler moves loads down to between the first results.
    tl.debug_barrier()
    q_window, q_taps = load_window(
        q + i_b * q_row + i_h * K, q_past, q_weight + i_h * K * W, o_k, K, W
    )
    k_window, k_taps = load_window(
        k + i_b * k_row + i_h * K, k_past, k_weight + i_h * K * W, o_k, K, W
    )
    b_f = tl.load(f + i_b * f_row + i_h * K + o_k, mask=o_k < K, other=float("-inf"))

    decay = tl.exp2(log2_decay(b_f.to(tl.float32), rate, bias, lower_bound, LAW, True))
    b_q = convolve(q_window, q_taps, W)
    b_k = convolve(k_window, k_taps, W)
    q_scale, k_scale = unit_scales(b_q, b_k)
    b_q *= q_scale * scale
    b_k *= k_scale
    o_all = tl.zeros([NUM_TILES, TILE_V], tl.float32)
    for i_v in tl.static_range(NUM_TILES):
        b_v = convolve(v_window, v_taps, W)
        b_state, b_o = step_state(b_state, b_q, b_k, b_v, decay, b_beta)
        b_o = b_o.to(DTYPE).to(tl.float32)  # the recurrence returns it in the dtype of v
        o_all = tl.where(tl.arange(0, NUM_TILES)[:, None] == i_v, b_o[None, :], o_all)
        tl.debug_barrier()
        m_state = (o_k < K)[:, None] & (o_v < V - i_v * TILE_V)[None, :]
        tl.store(state + p_state + i_v * TILE_V, b_state, mask=m_state)
        store_window(v_past, v_window, i_v * TILE_V + o_v, V, W)
        if i_v + 1 < NUM_TILES:
            o_next = (i_v + 1) * TILE_V + o_v
            m_state = (o_k < K)[:, None] & (o_next < V)[None, :]
            b_state = tl.load(state + p_state + (i_v + 1) * TILE_V, mask=m_state, other=0)
            v_window, v_taps = load_window(v, v_past, v_weight, o_next, V, W)
    store_window(q_past, q_window, o_k, K, W)
    store_window(k_past, k_window, o_k, K, W)
    mean = tl.sum(tl.sum(o_all * o_all, 1), 0) / V
    b_y = o_all * tl.rsqrt(mean + eps) * b_norm * tl.sigmoid(b_gate.to(tl.float32))
    tl.store(o + i_bh * V + p_all, b_y.to(DTYPE), mask=p_all < V)


def run_mixer_step(step: MixerStep) -> None:
    """Launch the kernel; its output and states are written in place."""
    (B, H, K, V), W = step.state.shape, step.conv_weights[0].shape[-1]
    inputs = (step.q, step.k, step.v, step.f, step.b, step.output_gate)
    inputs = tuple(x if x.stride(1) == 1 else x.contiguous() for x in inputs)
    parameters = (*step.conv_weights, step.gate.A_log, step.gate.dt_bias, step.norm_weight)
    BK, BV = padded(K), padded(V)
    tile_v = min(BV, _MAX_TILE)
    kda_mixer_step_kernel[(B * H,)](
        *inputs,
        *(x.contiguous() for x in parameters),
        *step.conv_states,
        *(step.state, step.output),
        *(1 / math.sqrt(K), step.norm_eps, step.gate.lower_bound or 0.0),
        *(x.stride(0) for x in inputs),
        H=H,
        K=K,
        V=V,
        W=W,
        BK=BK,
        TILE_V=tile_v,
        NUM_TILES=BV // tile_v,
        LAW=SOFTPLUS.value if step.gate.lower_bound is None else BOUNDED.value,
        # A thread per key channel: with more, what is computed per channel is computed many times
        # over, and its layout is imposed on the state.
        num_warps=max(BK // 32, 1),
    )
