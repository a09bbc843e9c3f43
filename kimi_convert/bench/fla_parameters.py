"""The parameter sets of flash-linear-attention's tests of KDA, with the errors that they allow.

Source: tests/ops/test_kda.py of fla-org/flash-linear-attention, bc3b101dcb71 (MIT): which shapes,
gates, lengths and bounds, as facts. Left out: what asks for FLA's own chunk sizes, its
intermediate states, and tests of which of its backends is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from kimi_convert.bench.fla_case import Allowed, Beta, FlaCase, Form, Shape


def _allowed(*only_warned_of: str, **errors: float) -> Allowed:
    return Allowed(MappingProxyType(errors), frozenset(only_warned_of))


_FORWARD = _allowed(o=0.005, ht=0.005)
_CHUNK = _allowed(
    "dA", o=0.005, ht=0.005, dq=0.008, dk=0.008, dv=0.008, dg=0.02, db=0.02, dh0=0.008, dA=0.003,
    dbias=0.008,
)  # fmt: skip
_VARLEN = _allowed(
    "dA", o=0.005, ht=0.005, dq=0.007, dk=0.008, dv=0.007, dg=0.015, db=0.015, dh0=0.007, dA=0.008,
    dbias=0.005,
)  # fmt: skip
_GATE = _allowed(o=1e-4, dg=1e-4, dA=1e-4, dbias=1e-4)
_FLASH = _allowed(o=0.006, ht=0.006)


def _naive_chunk() -> list[FlaCase]:
    rows = [
        ((1, 64, 1, 1, 64), 1, 1),
        ((2, 512, 3, 3, 60), 1, 1),
        ((4, 1024, 4, 4, 128), 0.1, 1),
        ((4, 1024, 4, 4, 128), 1, 10),
        ((1, 64, 1, 2, 64), 1, 1),
        ((2, 512, 2, 4, 60), 1, 1),
    ]
    return [
        FlaCase(
            test="naive_chunk",
            form=Form.CHUNK,
            shape=Shape(*shape),
            scale=scale,
            normalizer=normalizer,
            dtype="float32",
            allowed=_FORWARD,
        )
        for shape, scale, normalizer in rows
    ]


def _recurrent() -> list[FlaCase]:
    rows = [
        ((1, 64, 1, 1, 64), 1, False),
        ((2, 512, 3, 3, 60), 1, False),
        ((3, 1000, 4, 4, 100), 0.1, True),
        ((4, 1024, 4, 4, 128), 0.1, False),
        ((2, 512, 2, 4, 60), 1, False),
        ((2, 1024, 2, 8, 128), 0.1, True),
    ]
    return [
        FlaCase(
            test="fused_recurrent",
            form=Form.RECURRENT,
            shape=Shape(*shape),
            scale=scale,
            qk_norm=qk_norm,
            dtype="float32",
            allowed=_FORWARD,
        )
        for shape, scale, qk_norm in rows
    ]


def _recurrent_beta() -> list[FlaCase]:
    rows = [((2, 256, 4, 4, 64), False), ((2, 256, 4, 4, 64), True), ((1, 512, 3, 3, 60), True)]
    return [
        FlaCase(
            test="fused_recurrent_use_beta_sigmoid_in_kernel",
            form=Form.RECURRENT,
            shape=Shape(*shape),
            doubled_beta=doubled,
            scale=None,
            beta=Beta.INSIDE,
            dtype="float32",
            allowed=_FORWARD,
            against_twin=0.005,
        )
        for shape, doubled in rows
    ]


def _recurrent_v_first() -> list[FlaCase]:
    rows = [
        ((1, 64, 1, 1, 64), 1),
        ((2, 512, 3, 3, 60), 1),
        ((3, 1000, 4, 4, 100), 0.1),
        ((4, 1024, 4, 4, 128), 0.1),
    ]
    return [
        FlaCase(
            test="fused_recurrent_state_v_first",
            form=Form.RECURRENT,
            shape=Shape(*shape),
            scale=scale,
            state_v_first=True,
            dtype="float32",
            allowed=_FORWARD,
            against_twin=1e-4,
        )
        for shape, scale in rows
    ]


def _recurrent_gate() -> list[FlaCase]:
    rows = [
        ((1, 64, 1, 1, 64), 1, True, False, False, "float32"),
        ((2, 256, 2, 2, 64), 1, True, True, False, "float32"),
        ((2, 512, 2, 4, 64), 0.1, True, True, True, "float16"),
        ((3, 1000, 2, 8, 128), 1, True, False, False, "float16"),
        ((4, 1024, 4, 4, 128), 0.1, True, True, True, "float16"),
        ((1, 64, 1, 1, 64), 1, False, False, True, "float32"),
        ((2, 256, 2, 4, 64), 1, False, True, True, "float32"),
    ]
    return [
        FlaCase(
            test="fused_recurrent_gate_in_kernel",
            form=Form.RECURRENT,
            shape=Shape(*shape),
            scale=scale,
            dtype=dtype,
            has_rates=has_rates,
            has_bias=has_bias,
            fused_gate=True,
            lower_bound=-5.0 if bounded else None,
            qk_norm=True,
            allowed=_allowed(o=0.002, ht=0.002),
        )
        for shape, scale, has_rates, has_bias, bounded, dtype in rows
    ]


def _decode() -> list[FlaCase]:
    rows = [
        (16, 16, 128, 0.1, 1.0, True, False, False, "bfloat16"),
        (32, 8, 64, 1.0, 1.0, False, False, False, "float16"),
        (7, 32, 128, 0.5, 0.5, True, False, False, "bfloat16"),
        (16, 16, 128, 0.1, 1.0, True, True, False, "bfloat16"),
        (32, 8, 64, 1.0, 1.0, False, True, False, "float16"),
        (7, 32, 128, 0.5, 0.5, True, True, True, "bfloat16"),
    ]
    return [
        FlaCase(
            test="fused_recurrent_vllm_decode",
            form=Form.DECODE,
            shape=Shape(1, B, H, H, D),
            scale=scale,
            normalizer=normalizer,
            dtype=dtype,
            offsets=tuple(range(B + 1)),
            qk_norm=qk_norm,
            fused_gate=gate,
            lower_bound=-5.0 if bounded else None,
            allowed=_FORWARD,
        )
        for B, H, D, scale, normalizer, qk_norm, gate, bounded, dtype in rows
    ]


def _chunk() -> list[FlaCase]:
    # (B, T, H, HV, D), scale, normalizer, mask, qk_norm, gate, dtype, bounded
    rows = [
        ((1, 63, 1, 1, 64), 1, 1, 0, False, False, "float16", True),
        ((2, 500, 3, 3, 60), 1, 1, 0, False, False, "float16", True),
        ((2, 1000, 3, 3, 64), 0.1, 1, 0.5, False, False, "float16", False),
        ((3, 1024, 4, 4, 100), 1, 0.1, 0, False, False, "float16", False),
        ((4, 1024, 4, 4, 128), 0.1, 1, 0, False, False, "float16", True),
        ((4, 1024, 4, 4, 128), 0.1, 1, 0, True, False, "float16", True),
        ((2, 1500, 4, 4, 128), 0.1, 10, 0, False, True, "float16", False),
        ((4, 2048, 8, 8, 64), 0.1, 1, 0, False, True, "float16", True),
        ((2, 1024, 2, 4, 64), 0.1, 1, 0, False, False, "float16", False),
        ((2, 1024, 2, 8, 64), 0.1, 1, 0, False, True, "float16", False),
        ((2, 1024, 4, 8, 128), 0.1, 1, 0, True, True, "float16", False),
        ((2, 160, 2, 4, 64), 0.1, 1, 0, False, True, "float16", True),
        ((2, 1024, 2, 4, 64), 0.1, 1, 0, True, True, "bfloat16", True),
        ((2, 1024, 2, 4, 64), 0.1, 1, 0, False, True, "bfloat16", False),
        ((2, 160, 2, 4, 64), 0.1, 1, 0, False, True, "bfloat16", True),
        ((2, 1024, 2, 8, 128), 0.1, 1, 0, True, True, "bfloat16", False),
    ]
    return [
        FlaCase(
            test="chunk",
            form=Form.CHUNK,
            shape=Shape(*shape),
            scale=scale,
            normalizer=normalizer,
            zeroed=mask,
            qk_norm=qk_norm,
            fused_gate=gate,
            dtype=dtype,
            normal_rates=True,
            clamped=bounded and not gate,
            lower_bound=-5.0 if bounded and gate else None,
            gradients=True,
            allowed=_CHUNK,
        )
        for shape, scale, normalizer, mask, qk_norm, gate, dtype, bounded in rows
    ]


def _chunk_v_first() -> list[FlaCase]:
    rows = [
        ((1, 63, 1, 1, 64), 1),
        ((2, 500, 3, 3, 60), 1),
        ((3, 1024, 4, 4, 128), 0.1),
        ((4, 2048, 8, 8, 64), 0.1),
    ]
    return [
        FlaCase(
            test="chunk_state_v_first",
            form=Form.CHUNK,
            shape=Shape(*shape),
            scale=scale,
            state_v_first=True,
            dtype="float16",
            gradients=True,
            allowed=_CHUNK,
            against_twin=1e-4,
        )
        for shape, scale in rows
    ]


def _chunk_beta() -> list[FlaCase]:
    rows = [
        ((1, 8192, 96, 96, 128), False, "bfloat16"),
        ((1, 8192, 96, 96, 128), True, "bfloat16"),
        ((2, 96, 2, 2, 64), True, "float16"),
    ]
    return [
        FlaCase(
            test="chunk_use_beta_sigmoid_in_kernel",
            form=Form.CHUNK,
            shape=Shape(*shape),
            doubled_beta=doubled,
            dtype=dtype,
            scale=None,
            beta=Beta.INSIDE,
            gradients=True,
            allowed=_CHUNK,
            against_twin=1e-4,
        )
        for shape, doubled, dtype in rows
    ]


_Varlen = tuple[int, float, tuple[int, ...], bool, bool]  # D, mask, offsets, fused gate, clamped


def _varlen(test: str, rows: Sequence[_Varlen], *, gradients: bool) -> list[FlaCase]:
    return [
        FlaCase(
            test=test,
            form=Form.CHUNK,
            shape=Shape(1, offsets[-1], 4, 4, D),
            zeroed=0.0 if gate else mask,
            fused_gate=gate,
            offsets=offsets,
            scale=None,
            normal=True,
            drowned=mask,
            clamped=clamped,
            dtype="float16",
            gradients=gradients,
            allowed=_VARLEN,
        )
        for D, mask, offsets, gate, clamped in rows
    ]


_LONG_LENGTHS = (0, 100, 300, 1200, 3000, 4096)
_SHARED_VARLEN = [
    (64, 0.9, (0, 256, 500, 1000), True, False),
    (128, 0.5, (0, 256, 500, 1000), False, False),
    (100, 0, (0, 15, 100, 300, 1200, 2000), True, False),
    (256, 0, _LONG_LENGTHS, False, True),
]


def _gate() -> list[FlaCase]:
    rows = [
        ((1, 2, 2, 2, 12), True, False, -5.0),
        ((1, 32, 2, 2, 16), True, False, -5.0),
        ((2, 64, 4, 4, 32), True, False, -5.0),
        ((4, 128, 8, 8, 64), True, False, -5.0),
        ((4, 128, 8, 8, 128), True, False, None),
        ((1, 2, 2, 2, 12), True, True, None),
        ((1, 32, 2, 2, 16), True, True, None),
        ((2, 64, 4, 4, 32), True, True, None),
        ((4, 128, 8, 8, 64), True, True, None),
        ((4, 128, 8, 8, 128), True, True, None),
        ((1, 2, 2, 2, 12), False, False, -5.0),
        ((2, 64, 4, 4, 32), False, False, -5.0),
        ((4, 128, 8, 8, 64), False, True, -5.0),
        ((4, 128, 8, 8, 128), False, True, -5.0),
    ]
    return [
        FlaCase(
            test="gate",
            form=Form.GATE,
            shape=Shape(*shape),
            has_rates=has_rates,
            has_bias=has_bias,
            lower_bound=lower_bound,
            fused_gate=True,
            spread=10.0,
            dtype="float32",
            gradients=True,
            allowed=_GATE,
        )
        for shape, has_rates, has_bias, lower_bound in rows
    ]


def _flash() -> list[FlaCase]:
    equal = [(1, 1024, 4, ()), (2, 2048, 8, ()), (1, 4096, 16, ())]
    packed = [
        (4, (0, 256, 500, 1000)),
        (8, (0, 100, 300, 1200, 2000)),
        (16, (0, 101, 303, 1205, 3007, 4096)),
    ]
    rows = [*equal, *((1, offsets[-1], H, offsets) for H, offsets in packed)]
    return [
        FlaCase(
            test="flash_kda_chunk_varlen" if offsets else "flash_kda_chunk",
            form=Form.CHUNK,
            shape=Shape(B, T, H, H, 128),
            offsets=offsets,
            normal=bool(offsets),
            scale=None,
            qk_norm=True,
            fused_gate=True,
            lower_bound=-5.0,
            beta=Beta.INSIDE,
            state_v_first=True,
            dtype="bfloat16",
            allowed=_FLASH,
        )
        for B, T, H, offsets in rows
    ]


FLA_CASES = (
    *_naive_chunk(),
    *_recurrent(),
    *_recurrent_beta(),
    *_recurrent_v_first(),
    *_recurrent_gate(),
    *_decode(),
    *_chunk(),
    *_chunk_v_first(),
    *_chunk_beta(),
    *_varlen(
        "chunk_varlen",
        [
            (60, 0.1, (0, 15), True, False),
            *_SHARED_VARLEN,
            (60, 0.1, (0, 31, 96, 160), True, False),
        ],
        gradients=True,
    ),
    *_varlen(
        "chunk_varlen_prefill",
        [(60, 0.1, (0, 8192), True, False), *_SHARED_VARLEN],
        gradients=False,
    ),
    *_gate(),
    *_flash(),
)
