"""KDA as the report writes it: one token after another, and one chunk in closed form.

Both functions compute in the dtype of their inputs, which must be one and the same, and check
nothing. In fp64 the recurrence is the oracle for every other form; `recurrent_kda` runs it as
it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent_kda_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule token by token: decay first, delta second, read last.

        S <- diag(exp g) S;  u = beta (v - S^T k);  S <- S + k u^T;  o = scale S^T q

    Args:
        q: [B, T, H, K], B and T above 0. Normalised queries.
        k: [B, T, H, K]. Normalised keys.
        v: [B, T, H, V]. Values.
        g: [B, T, H, K]. Natural log decay, <= 0.
        beta: [B, T, H]. Write strength in (0, 1).
        scale: Multiplies q.
        state: [B, H, K, V]. S before the first token.

    Returns:
        Output [B, T, H, V] and the state [B, H, K, V] after the last token.

    Source: Kimi Linear report, arXiv 2510.26692, Eq. 1: S_t = (I - beta k k^T) diag(exp g)
    S_{t-1} + beta k v^T, with the delta factored out.
    """
    rows = (scale * q, k, v, g.exp(), beta.unsqueeze(-1))  # [B, T, H, K | V | 1]
    outputs: list[Tensor] = []
    for q_t, k_t, v_t, decay_t, beta_t in zip(
        *(row.unsqueeze(-2).unbind(dim=1) for row in rows), strict=True
    ):  # each [B, H, 1, K | V | 1]
        state = decay_t.mT * state
        delta = beta_t * (v_t - k_t @ state)
        state = state + k_t.mT * delta
        outputs.append(q_t @ state)
    return torch.cat(outputs, dim=-2).transpose(1, 2), state


def chunk_kda_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Treat all T tokens as one chunk: solve for every delta at once.

    With G_i = g_1 + ... + g_i and D_ij = exp(G_i - G_j) per key channel, i >= j, the rows
    of u (the deltas) and of o are

        u_i = beta_i (v_i - S_0^T (exp(G_i) k_i) - sum_{j<i} (k_i . D_ij k_j) u_j)
        o_i = scale (S_0^T (exp(G_i) q_i) + sum_{j<=i} (q_i . D_ij k_j) u_j)
        S_T = diag(exp G_T) S_0 + sum_j (D_Tj k_j) u_j^T

    Arguments and results are those of `recurrent_kda_reference`. Takes T * T * K memory.
    Differences of G round like G itself: it is for reading and for gates of moderate size.

    Source: Kimi Linear report, arXiv 2510.26692, section 3 (chunkwise form).
    """
    q, k, v, g, beta = (x.transpose(1, 2) for x in (scale * q, k, v, g, beta.unsqueeze(-1)))
    total = g.cumsum(dim=-2)  # [B, H, T, K]
    lower = torch.ones(*g.shape[-2:-1] * 2, dtype=torch.bool, device=g.device).tril()
    difference = total.unsqueeze(-2) - total.unsqueeze(-3)  # [B, H, T, T, K]
    decay = difference.masked_fill(~lower.unsqueeze(-1), -torch.inf).exp()
    weighted_k = decay * k.unsqueeze(-3)  # [B, H, T(i), T(j), K]
    reads = torch.einsum("bhik,bhijk->bhij", q, weighted_k)
    writes = torch.einsum("bhik,bhijk->bhij", k, weighted_k).tril(-1)
    delta = torch.linalg.solve_triangular(
        beta * writes,
        beta * (v - (total.exp() * k) @ state),
        upper=False,
        unitriangular=True,
    )
    output = (total.exp() * q) @ state + reads @ delta
    state = total[..., -1, :].exp().unsqueeze(-1) * state + weighted_k[..., -1, :, :].mT @ delta
    return output.transpose(1, 2), state
