"""The three normalisations of Kimi-Linear over the last dim.

Start with `reference.py`; `op.py` holds the public functions. They differ in where the result is
rounded to the dtype of x, and that is part of the format.
"""

from __future__ import annotations

from kimi_convert.kernels.norm.op import gated_rms_norm, l2_norm, rms_norm

__all__ = ["gated_rms_norm", "l2_norm", "rms_norm"]
