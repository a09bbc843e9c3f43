"""The processes of one distillation: alone, or started by `torchrun`, one for each device.

Every process holds a part of each layer and trains on a part of each step's rows. What is decided by
a number is decided by the first one's, since devices may round differently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# The others wait while the first aligns layers; an error there ends them at once, not this.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among all; by default the only one."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.mesh is not None:
            dist.barrier()

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this process's part of the rows of a step."""
        return rows[self.rank :: self.size]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of every process's values."""
        if self.mesh is None:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def agreed(self, value: float, device: torch.device) -> float:
        """Return the first process's value."""
        if self.mesh is None:
            return value
        told = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(told, 0)
        return float(told)

    def shard(self, module: nn.Module, *, also: str = "forward") -> None:
        """Leave each process a part of a module's weights; they meet while `forward` or `also` runs."""
        if self.mesh is not None:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            # Also after a forward pass alone, else what is trained would be another tensor there.
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True)
            register_fsdp_forward_method(module, also)


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Meet the processes that `torchrun` started, if it did; give each a device of its own.

    Args:
        device: "cpu", or "cuda", where process n of a machine takes GPU n.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(), device
        return
    from torch.distributed.device_mesh import init_device_mesh

    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(_BACKENDS[device.type], timeout=_PATIENCE)
    try:
        mesh = init_device_mesh(device.type, (size,))
        yield Ranks(rank=dist.get_rank(), size=size, mesh=mesh), device
    finally:
        dist.destroy_process_group()


def whole(value: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor of which every process may hold a part; all must call this."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def laid_out_as(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor, the same in every process, where and cut as another one is."""
    value = value.to(model.device)
    if not hasattr(model, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)
    return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)
