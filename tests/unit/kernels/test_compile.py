"""Kernels compile for a GPU, here without one: the interpreter accepts more than the compiler.

Compiled for Hopper, in a process of its own, since this one may have chosen the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROLOGUE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def build(kernel, meta, pointers, types):
    signature, constants, aligned = {}, {}, {}
    for n, name in enumerate(kernel.arg_names):
        kind = meta[name] if name in meta else types.get(name, pointers)
        if isinstance(kind, str):
            signature[name] = kind
            aligned[(n,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(n,)] = kind
    source = ASTSource(kernel, signature, constants, aligned)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

def numbers(kernel, *names, kind="i32"):
    return {name: kind for name in kernel.arg_names if name in names}

SIZES = ("blocks", "num_turns", "num_tiles", "length", "tiles_each", "num_sequences", "num_tokens")
STREAMS = tuple(f"{s}_{of}" for s in ("q", "k", "v", "d_q", "d_k", "d_v") for of in ("width", "row"))
"""

CONVOLUTION = """
from kimi_convert.kernels.short_conv.{file} import {kernel} as kernel
types = {{
    **numbers(kernel, *SIZES, *STREAMS),
    "cu_seqlens": "*i64", "tile_offsets": "*i32", "partials": "*fp32",
}}
build(kernel, dict(W=4, BT={tokens}, BP=256, BN=8, PACKED=True), "*bf16", types)
"""

NORM = """
from kimi_convert.kernels.norm.kernel import {kernel} as kernel
types = {{
    **numbers(kernel, "num_rows", "num_turns", "x_row", "gate_row", "d_y_row"),
    "eps": "fp32", "d_weight": "*fp32",
}}
build(kernel, dict(D=100, DIVISOR=100, ROWS=16, WIDTH=128), "*bf16", types)
"""


KERNELS = "".join(
    (
        PROLOGUE,
        CONVOLUTION.format(file="kernel", kernel="short_conv_forward_kernel", tokens=2),
        CONVOLUTION.format(file="backward", kernel="short_conv_backward_kernel", tokens=1),
        NORM.format(kernel="norm_forward_kernel"),
        NORM.format(kernel="norm_backward_kernel"),
    )
)


@pytest.mark.slow
def test_kernels_compile_with_everything_they_take(tmp_path):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env={**kept, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
