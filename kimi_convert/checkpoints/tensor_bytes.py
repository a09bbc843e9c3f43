"""Torch tensors as the bytes that a safetensors file holds. Imports torch."""

from __future__ import annotations

import torch

from kimi_convert.checkpoints.dtypes import dtype_from_torch_name
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.shard_plan import PlannedTensor
from kimi_convert.checkpoints.writer import ShardWriter
from kimi_convert.errors import VerificationError


def planned_like(name: str, tensor: torch.Tensor) -> PlannedTensor:
    """Return the plan's entry for a tensor as it is.

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    dtype = dtype_from_torch_name(str(tensor.dtype).removeprefix("torch."))
    return PlannedTensor(name, dtype, tuple(tensor.shape))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements row-major; a copy only if it is not laid out so already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_tensor(shard: ShardWriter, name: str, tensor: torch.Tensor) -> None:
    """Write the next tensor of a plan; it must not change until the file is finished.

    Raises:
        VerificationError: not the planned name, dtype or shape.
        ResourceError: the disk does not take it.
    """
    found = planned_like(name, tensor)
    planned = shard.next_tensor
    if found != planned:
        raise VerificationError(
            f"tensor {quoted(name)} is not as planned",
            where=shard.shard.file_name,
            expected=planned,
            found=found,
        )
    shard.write(name, tensor_bytes(tensor))
