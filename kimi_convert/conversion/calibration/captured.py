"""A step of a training as one CUDA graph: one launch in place of thousands.

A step of a small model is two thousand kernels of a few microseconds, which take the host ten times
as long to launch as the GPU to run. A graph is captured once and replayed for every step after.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_EAGER = 3  # steps before the capture: kernels compile, and the optimizer allocates its moments


class CapturedStep:
    """Calls a step; on a GPU, after a few calls, replays what it launched."""

    def __init__(self, step: Callable[..., torch.Tensor], device: torch.device) -> None:
        """Prepare.

        Args:
            step: forward, backward and the optimizer's update from tensors of the same shapes each
                time; returns the loss. It launches the same kernels at the same addresses each
                time and never waits for the device: an optimizer has `capturable`, its rates are
                tensors, gradients are set to None before the backward pass.
            device: where it runs; on a CPU it is only called.
        """
        self._step = step
        self._ran = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        # A capture needs a stream of its own; leaves remember the stream that they began on.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._loss = torch.empty(0)

    @property
    def replays(self) -> bool:
        """Whether the last step was a replay."""
        return self._graph is not None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Take a step on inputs, on the device or not; return the loss, of which nobody has waited."""
        if self._stream is None:
            return self._step(*inputs).detach()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            loss = self._on_stream(inputs)
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return loss

    def _on_stream(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        assert self._stream is not None
        if self._ran == _EAGER:
            self._capture(inputs)
        self._ran += 1
        if self._graph is None:
            moved = (x.to(self._stream.device, non_blocking=True) for x in inputs)
            return self._step(*moved).detach()
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._loss.clone()

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """Record what a step launches, without running it; where that fails, steps stay as they are."""
        assert self._stream is not None
        self._inputs = tuple(x.to(self._stream.device, copy=True) for x in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._loss = self._step(*self._inputs).detach()
        except RuntimeError:  # the step waits for the device, or a graph's own memory is too much
            return
        self._graph = graph


class Rates:
    """The learning rates of an optimizer's groups; on a GPU in tensors, which a graph reads anew."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """Take the rates that the groups have for the whole ones."""
        self._groups = optimizer.param_groups
        self._whole = [float(group["lr"]) for group in self._groups]
        self._now: torch.Tensor | None = None
        if device.type == "cuda":
            self._now = torch.tensor(self._whole, device=device)
            for group, rate in zip(self._groups, self._now, strict=True):
                group["lr"] = rate

    def scale(self, share: float) -> None:
        """Let the next steps take this share of the whole rates."""
        if self._now is not None:
            self._now.copy_(share * torch.tensor(self._whole), non_blocking=True)
            return
        for group, rate in zip(self._groups, self._whole, strict=True):
            group["lr"] = share * rate
