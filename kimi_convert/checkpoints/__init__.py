"""Bytes and names of checkpoints in safetensors format: no model, no maths.

Nothing here imports torch until a tensor is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kimi_convert.checkpoints.byte_size import parse_byte_size
from kimi_convert.checkpoints.index import CheckpointIndex, open_index
from kimi_convert.checkpoints.output import open_output
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.checkpoints.shard_plan import PlannedTensor, ShardPlan, plan_shards

if TYPE_CHECKING:
    from kimi_convert.checkpoints.tensor_bytes import write_tensor

__all__ = [
    "CheckpointIndex",
    "CheckpointReader",
    "PlannedTensor",
    "ShardPlan",
    "TensorSpec",
    "open_index",
    "open_output",
    "parse_byte_size",
    "plan_shards",
    "write_tensor",
]


def __getattr__(name: str) -> object:
    """Import the one name that needs torch when it is first asked for."""
    if name == "write_tensor":
        return import_module("kimi_convert.checkpoints.tensor_bytes").write_tensor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
