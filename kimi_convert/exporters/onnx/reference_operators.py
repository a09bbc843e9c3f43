"""The operators of domain ai.kimi for ONNX's reference evaluator, in numpy, one token at a time.

    onnx.reference.ReferenceEvaluator(model, new_ops=REFERENCE_OPERATORS)

Installed, the package also names them in the entry-point group `onnx.reference_ops`. They follow the
schemas in docs/formats/onnx.md rather than the functions that a file brings along, so that the two can be
held against each other.
"""

from __future__ import annotations

import numpy as np
from onnx.reference.op_run import OpRun


class KimiDeltaAttention(OpRun):
    """S_t = (I - beta k k^T) diag(exp g) S_{t-1} + beta k v^T,  o_t = scale S_t^T q_t."""

    op_domain = "ai.kimi"

    def _run(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        g: np.ndarray,
        beta: np.ndarray,
        past_state: np.ndarray,
        num_heads: int,
        scale: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the output [B, T, H V] and the state [B, H, K, V] after it.

        Args:
            q: [B, T, H K], unit length per head.
            k: [B, T, H K], unit length per head.
            v: [B, T, H V].
            g: [B, T, H K], natural log of the decay.
            beta: [B, T, H].
            past_state: [B, H, K, V].
            num_heads: H.
            scale: factor on the output.
        """
        batch, tokens, _ = q.shape
        q, k, v, g = (x.reshape(batch, tokens, num_heads, -1) for x in (q, k, v, g))
        state = past_state.copy()
        output = np.empty_like(v)
        for t in range(tokens):
            state *= np.exp(g[:, t])[..., None]
            missing = v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], state)
            written = beta[:, t][..., None] * missing
            state += k[:, t][..., None] * written[..., None, :]
            output[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
        return output.reshape(batch, tokens, -1), state


class KimiShortConv(OpRun):
    """silu(causal depthwise convolution of x), and the last W - 1 inputs."""

    op_domain = "ai.kimi"

    def _run(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        past_state: np.ndarray,
        activation: str,
        channels: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return y [B, T, C] and the state [B, C, W - 1] after it.

        Args:
            x: [B, T, C].
            weight: [C, 1, W]; tap W - 1 meets the current token.
            past_state: [B, C, W - 1].
            activation: "silu".
            channels: C.
        """
        if activation != "silu":
            raise ValueError(f"KimiShortConv has no activation {activation!r}, only 'silu'")
        assert x.shape[-1] == channels
        tokens, width = x.shape[1], weight.shape[-1]
        seen = np.concatenate((past_state, x.transpose(0, 2, 1)), axis=-1)  # [B, C, W - 1 + T]
        summed = sum(
            weight[:, 0, tap, None] * seen[..., tap : tap + tokens] for tap in range(width)
        )
        y = summed / (1 + np.exp(-summed))
        return y.transpose(0, 2, 1).astype(x.dtype), seen[..., tokens:]


REFERENCE_OPERATORS = (KimiDeltaAttention, KimiShortConv)
