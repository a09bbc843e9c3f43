"""Kimi Delta Attention: the gate laws and the two forms of the recurrence.

Start with `reference.py`; `chunk.py` holds the fast form, `op.py` the public functions.
"""

from __future__ import annotations

from kimi_convert.kernels.kda.gate import Gate, bounded_gate, softplus_gate
from kimi_convert.kernels.kda.op import chunk_kda, recurrent_kda

__all__ = ["Gate", "bounded_gate", "chunk_kda", "recurrent_kda", "softplus_gate"]
