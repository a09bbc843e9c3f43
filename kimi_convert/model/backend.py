"""Where a model runs: on which device, and its kernels on which backend."""

from __future__ import annotations

import torch
from torch import nn

from kimi_convert.errors import UsageError
from kimi_convert.kernels.backend import Backend


class KernelModule(nn.Module):
    """A module that calls kernels."""

    # None takes the fastest: torch's on a CPU, Triton's and CUDA C++'s on a GPU.
    backend: Backend | None = None


def use_backend(module: nn.Module, backend: Backend | None) -> None:
    """Have a module and everything in it run on a backend; None lets the device decide."""
    for part in module.modules():
        if isinstance(part, KernelModule):
            part.backend = backend


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device that a tensor can be put on.

    Raises:
        UsageError: there is no such device here.
    """
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "there is no such device here",
            expected="cpu, or cuda where torch finds a GPU",
            found=str(device),
        ) from error
