"""The short convolution of KDA: causal, depthwise, without bias, followed by SiLU.

Start with `reference.py`; `kernel.py` and `backward.py` are the same on Triton, `op.py` the public
functions. One function serves prefill, chunked prefill and single steps: it takes the last inputs
of what came before and returns the last inputs of what it was given.
"""

from __future__ import annotations

from kimi_convert.kernels.short_conv.op import short_conv, short_conv_qkv, short_conv_qkv_

__all__ = ["short_conv", "short_conv_qkv", "short_conv_qkv_"]
