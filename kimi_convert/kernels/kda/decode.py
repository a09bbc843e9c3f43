"""KDA token by token on Triton, for decode.

    S <- diag(exp g) S;  u = beta (v - S^T k);  S <- S + k u^T;  o = scale S^T q

A state is read once, kept in registers over all tokens and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_convert.kernels.kda.device import PRECOMPUTED, log2_decay
from kimi_convert.kernels.kda.problem import padded
from kimi_convert.kernels.kda.step import step_state, unit_scales
from kimi_convert.kernels.kda.target import check_target

# Values of the state per program and its warps, by the heads of all sequences: few heads need more
# programs to fill a GPU, many are faster in longer rows. H=32 K=V=128 on an H200, microseconds of a
# replayed graph, for 8, 16, 32, 64 and 128 value channels (128 values of the state to a channel; 1, 1,
# 1, 4 and 4 warps):
#
#     B=1      6.4    5.8    6.0    6.5    7.6
#     B=64    96.8   74.9   70.8   69.3   71.5     91% of a copy's rate at best
#     B=256  373    284    269    262    265       97%
TILES = ((64, (2048, 1)), (float("inf"), (8192, 4)))
_NARROWEST_TILE = 8  # value channels: rows of 32 bytes, what memory is read in


@triton.jit
def load_keys(q, k, g, o_k, width, NO_DECAY: tl.constexpr):
    """Load the first `width` key channels of a token; the others leave the state alone."""
    m_k = o_k < width
    b_q = tl.load(q + o_k, mask=m_k, other=0)
    b_k = tl.load(k + o_k, mask=m_k, other=0)
    b_g = tl.load(g + o_k, mask=m_k, other=NO_DECAY)
    return b_q, b_k, b_g


@triton.jit
def kda_decode_kernel(
    # inputs
    q,  # [T, H, K]
    k,  # [T, H, K]
    v,  # [T, HV, V]
    g,  # [T, HV, K]
    beta,  # [T, HV]
    A_log,  # [HV]
    dt_bias,  # [HV, K]
    initial,  # [N, HV, K, V] fp32, where HAS_INITIAL; may be `final`
    cu_seqlens,  # [N + 1], where PACKED
    # outputs
    o,  # [T, HV, V]
    final,  # [N, HV, K, V] fp32
    # sizes
    length,  # tokens of a sequence, of all where PACKED
    scale,
    lower_bound,
    # meta
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # K, padded to a power of two
    TILE_V: tl.constexpr,
    LAW: tl.constexpr,
    QK_NORM: tl.constexpr,
    BETA_LOGITS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    SINGLE: tl.constexpr,  # one token per sequence, not PACKED
):
    """Run TILE_V value channels of one head of one sequence; the id is (N, HV, tile), last fastest.

    All tensors contiguous. Each program reads and writes its own [K, TILE_V] of the state only, so
    the final states may be written over the initial ones. Lanes past K or V hold 0. A token's rows
    are loaded while the one before it is worked on. Offsets outside the tokens are moved inside.
    """
    NO_DECAY: tl.constexpr = 0.0 if LAW == PRECOMPUTED else float("-inf")
    tiles: tl.constexpr = (V + TILE_V - 1) // TILE_V
    i_v = tl.program_id(0) % tiles
    i_nh = tl.program_id(0) // tiles
    i_n = i_nh // HV
    i_h = i_nh % HV
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_n).to(tl.int64), 0), length)
        steps = tl.minimum(tl.load(cu_seqlens + i_n + 1).to(tl.int64), length) - start
    else:
        start = i_n.to(tl.int64) * length
        steps = tl.full([], 1, tl.int32) if SINGLE else length
    o_k = tl.arange(0, BK)
    o_v = i_v * TILE_V + tl.arange(0, TILE_V)
    m_v = o_v < V
    q += (start * H + i_h // (HV // H)) * K
    k += (start * H + i_h // (HV // H)) * K
    v += (start * HV + i_h) * V
    o += (start * HV + i_h) * V
    g += (start * HV + i_h) * K
    beta += start * HV + i_h
    present = steps > 0
    p_state = i_nh.to(tl.int64) * (K * V) + o_k[:, None] * V + o_v[None, :]
    m_state = (o_k < K)[:, None] & m_v[None, :]
    state = tl.zeros([BK, TILE_V], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + p_state, mask=m_state, other=0)
    b_v = tl.load(v + o_v, mask=o_v < tl.where(present, V, 0), other=0)
    b_beta = tl.load(beta, mask=present, other=0)
    rate = 0.0
    bias = tl.zeros([BK], tl.float32)
    if LAW != PRECOMPUTED:
        rate = tl.exp(tl.load(A_log + i_h).to(tl.float32))
        bias = tl.load(dt_bias + i_h * K + o_k, mask=o_k < K, other=0).to(tl.float32)
    # What is needed first is loaded last, so that no load waits until another has arrived: left to
    # itself, the compiler moves loads down to between the first results.
    tl.debug_barrier()
    b_q, b_k, b_g = load_keys(q, k, g, o_k, tl.where(present, K, 0), NO_DECAY)

    for i_t in range(steps):
        token_q = b_q.to(tl.float32)
        token_k = b_k.to(tl.float32)
        token_v = b_v.to(tl.float32)
        decay = tl.exp2(log2_decay(b_g.to(tl.float32), rate, bias, lower_bound, LAW, True))
        token_beta = b_beta.to(tl.float32)
        if not SINGLE:
            q += H * K
            k += H * K
            v += HV * V
            g += HV * K
            beta += HV
            present = i_t + 1 < steps
            b_q, b_k, b_g = load_keys(q, k, g, o_k, tl.where(present, K, 0), NO_DECAY)
            b_v = tl.load(v + o_v, mask=o_v < tl.where(present, V, 0), other=0)
            b_beta = tl.load(beta, mask=present, other=0)
        if QK_NORM:
            q_scale, k_scale = unit_scales(token_q, token_k)
            token_q *= q_scale
            token_k *= k_scale
        if BETA_LOGITS:
            token_beta = tl.sigmoid(token_beta)
        state, b_o = step_state(state, token_q * scale, token_k, token_v, decay, token_beta)
        tl.store(o + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
        if not SINGLE:
            o += HV * V
    tl.store(final + p_state, state, mask=m_state)


def recurrent_kda_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    state: Tensor | None,
    qk_norm: bool,
    law: int,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = 0.0,
    beta_logits: bool = False,
    cu_seqlens: Tensor | None = None,
    output: Tensor | None = None,
    final_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a call that `check_arguments` has passed; see `recurrent_kda`.

    Allocates and waits for nothing where `output` and `final_state` are given and the inputs are
    contiguous; others are copied.

    Args:
        q: [B, T, H, K] bf16 | fp16 | fp32.
        k: [B, T, H, K].
        v: [B, T, HV, V].
        g: [B, T, HV, K]. Natural log decay, or the gate's projection: see `law`.
        beta: [B, T, HV].
        scale: Multiplies q.
        state: [N, HV, K, V] fp32. S before the first token; zeros if None.
        qk_norm: Divide q and k by sqrt(sum of squares + 1e-6) first.
        law: `PRECOMPUTED`, `SOFTPLUS` or `BOUNDED` of `device`.
        A_log: [HV], not for `PRECOMPUTED`.
        dt_bias: [HV, K], not for `PRECOMPUTED`.
        lower_bound: Natural log, < 0, for `BOUNDED`.
        beta_logits: Take the sigmoid of beta first.
        cu_seqlens: [N + 1] int32 | int64, contiguous, of sequences packed in T where B is 1.
        output: [B, T, HV, V] in v's dtype, contiguous. Written; allocated if None.
        final_state: [N, HV, K, V] fp32, contiguous. Written; may be `state`; allocated if None.

    Returns:
        output and final_state.

    Raises:
        KernelInputError: `output` or `final_state` does not fit.
    """
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    output = _target("output", output, v.shape, dtype=v.dtype, device=v.device)
    final_state = _target(
        "final_state", final_state, (N, HV, K, V), dtype=torch.float32, device=v.device
    )
    if N == 0:
        return output, final_state
    BK = padded(K)
    tile_v, num_warps = _tile(N * HV, BK=BK, BV=padded(V))
    kda_decode_kernel[(N * HV * -(-V // tile_v),)](
        *(x.contiguous() for x in (q, k, v, g, beta)),
        *(None if x is None else x.contiguous() for x in (A_log, dt_bias, state)),
        *(cu_seqlens, output, final_state, T, scale, lower_bound),
        H=H,
        HV=HV,
        K=K,
        V=V,
        BK=BK,
        TILE_V=tile_v,
        LAW=law,
        QK_NORM=qk_norm,
        BETA_LOGITS=beta_logits,
        HAS_INITIAL=state is not None,
        PACKED=cu_seqlens is not None,
        SINGLE=T == 1 and cu_seqlens is None,
        num_warps=num_warps,
    )
    return output, final_state


def recurrent_kda_triton_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    state: Tensor,
    qk_norm: bool,
    law: int,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = 0.0,
    beta_logits: bool = False,
    cu_seqlens: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Do as `recurrent_kda_triton`, write the final state over `state`, return the output."""
    return recurrent_kda_triton(
        *(q, k, v, g, beta),
        scale=scale,
        state=state,
        qk_norm=qk_norm,
        law=law,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        beta_logits=beta_logits,
        cu_seqlens=cu_seqlens,
        output=output,
        final_state=state,
    )[0]


def _target(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if tensor is None:
        return torch.empty(shape, dtype=dtype, device=device)
    check_target("recurrent_kda_triton", name, tensor, shape=shape, dtype=dtype, device=device)
    return tensor


def _tile(heads: int, *, BK: int, BV: int) -> tuple[int, int]:
    """Return the value channels and warps of a program, for the heads of all sequences."""
    values, num_warps = next(tile for limit, tile in TILES if heads <= limit)
    return min(max(values // BK, _NARROWEST_TILE), BV), num_warps
