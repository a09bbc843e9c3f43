"""How far a distillation is: the optimizer's state, the losses, and the best parameters so far."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kimi_convert.conversion.calibration.hybrid import Hybrid
from kimi_convert.conversion.calibration.ranks import laid_out_as, whole
from kimi_convert.conversion.calibration.store import CalibrationStore

_NAME = "distill-state"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class DistillState:
    """What an interrupted distillation goes on from."""

    def __init__(
        self, hybrid: Hybrid, optimizer: torch.optim.Optimizer, store: CalibrationStore
    ) -> None:
        """Take over the store's last state, if it has one: parameters of the hybrid included."""
        self.optimizer = optimizer
        self.losses: list[float] = []  # one for each finished step
        self.looks: list[list[float]] = []  # [steps, KL on validation tokens]
        self.best: dict[str, torch.Tensor] = {}
        self._hybrid, self._store = hybrid, store
        if store.has(_NAME):
            self._resume()

    @property
    def last_look(self) -> str:
        """What validation said last, for people."""
        return f"KL {self.looks[-1][1]:.3f}" if self.looks else ""

    def look(self, steps: int, kl: float) -> None:
        """Note what validation says after so many steps; keep the parameters if it is the best."""
        if kl < min((seen for _, seen in self.looks), default=float("inf")) or not self.best:
            self.best = {
                name: value.detach().clone() for name, value in self._hybrid.trained().items()
            }
        self.looks.append([steps, kl])

    def save(self) -> None:
        """Put everything into the store.

        Raises:
            ResourceError: the disk is full or cannot be written.
        """
        is_first = self._hybrid.ranks.is_first
        tensors: dict[str, torch.Tensor] = {}
        for name, part in self._parts():
            together = whole(part)  # one at a time: a device need not have room for all
            if is_first:
                tensors[name] = together.cpu()
        if is_first:
            self._store.save(_NAME, tensors, {"losses": self.losses, "looks": self.looks})

    def _parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in self.best.items():
            yield f"{name}:best", value
        for name, value in self._hybrid.trained().items():
            state = self.optimizer.state[value]
            yield from ((f"{name}:{key}", state[key]) for key in _MOMENTS)
            yield f"{name}:value", value.detach()

    def _resume(self) -> None:
        tensors, record = self._store.tensors(_NAME), self._store.record(_NAME)
        losses, looks = record["losses"], record["looks"]
        assert isinstance(losses, list)
        assert isinstance(looks, list)
        self.losses, self.looks = losses, looks
        for name, value in self._hybrid.trained().items():
            value.detach().copy_(laid_out_as(tensors[f"{name}:value"], value.detach()))
            fused = self.optimizer.defaults["fused"]
            self.optimizer.state[value] = {
                "step": torch.tensor(
                    float(len(losses)), device=value.device if fused else torch.device("cpu")
                ),
                **{k: laid_out_as(tensors[f"{name}:{k}"], value.detach()) for k in _MOMENTS},
            }
            if f"{name}:best" in tensors:
                self.best[name] = laid_out_as(tensors[f"{name}:best"], value.detach())
