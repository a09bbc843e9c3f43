"""Gradient steps on one mixer: all its parameters, towards its target, with the rest fixed.

The loss is |y - Z W|^2 / |y|^2 over a batch, so that layers of any scale take the same learning
rate; a parameter moves in units of its own size. Masters are fp32. The output matrix moves along
and is solved again afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.func import functional_call

from kimi_convert.config.calibration import AlignRecipe
from kimi_convert.conversion.calibration.captured import CapturedStep, Rates
from kimi_convert.conversion.calibration.students import Student
from kimi_convert.errors import VerificationError

_WARM_UP = 10
_BETAS = (0.9, 0.95)
_CLIP = 1.0
_DIVERGED = 4.0  # times the first loss, on average over as many steps as the next says
_AVERAGED = 10
_NEAR = 0.25  # what a first loss below it counts as: four times it is the error of no mixer at all
_NOTHING_TO_GAIN = 1e-6  # a relative squared error; bf16 weights alone make about 1e-5

# The size of a parameter's steps: a multiple of its own rms, or a number for what starts at 0 or
# is a logarithm. Chosen on calibration text of the bundled checkpoint.
_OWN_RMS = 16.0
_ABSOLUTE = {
    "A_log": 4.0,
    "dt_bias": 4.0,
    "f_b.weight": 1.0,
    "g_b.weight": 1.0,
    # Of Ling-3, on all dims of the input instead of a few strong directions: a guess.
    "f.weight": 0.25,
    "g.weight": 0.25,
    "gate.weight": 0.25,
}
_OF_OWN_RMS = {
    "q_conv.weight": 2.0,
    "k_conv.weight": 2.0,
    "v_conv.weight": 2.0,
    "o_norm.weight": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """How a training went."""

    losses: tuple[float, float]  # means over the first and over the last steps
    tokens: int  # drawn

    def to_record(self) -> dict[str, object]:
        """Return what a layer's report notes."""
        return {"align_losses": list(self.losses), "align_tokens": self.tokens}


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One parameter: base + scale * change."""

    base: torch.Tensor
    scale: float
    change: torch.Tensor

    @property
    def value(self) -> torch.Tensor:
        """The parameter now."""
        return self.base + self.scale * self.change


def align_mixer(
    student: Student,
    matrix: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    recipe: AlignRecipe,
    *,
    seed: int,
) -> Trained:
    """Train a mixer in place; one that is on its target already, or ends further away, stays.

    Args:
        student: its parameters change.
        matrix: [F, D], the output matrix to begin with; not changed.
        x: [N, T, D], inputs.
        y: [N, T, D], targets.
        recipe: how many steps of what size.
        seed: of the batches.

    Raises:
        VerificationError: the loss grows or is not finite. The student is unchanged.
    """
    training = _Training(student, matrix, recipe, on_gpu=x.is_cuda)
    take = CapturedStep(training.update, x.device)
    losses: list[float] = []
    drawn, start = 0, math.inf
    for step, rows in enumerate(_batches(len(x), x.shape[1], recipe, seed=seed)):
        if not step:
            start = float(training.loss(x[rows], y[rows]).detach())
            if start < _NOTHING_TO_GAIN:
                # A layer that stays as it was: steps of a fixed size would only lead away.
                return Trained(losses=(start, start), tokens=0)
        training.rates.scale(_share(step, recipe.steps))
        losses.append(float(take(x[rows], y[rows])))
        drawn += len(rows) * x.shape[1]
        _check(losses, recipe)
    if losses and _mean(losses[-_AVERAGED:]) > start:
        # One that began so near, as kept layers may, that steps of that size only led away.
        return Trained(losses=(start, start), tokens=drawn)
    for name, parameter in student.module.named_parameters():
        parameter.copy_(student.rounded(name, training.parameters[name].value.detach()))
    return Trained(losses=(_mean(losses[:_AVERAGED]), _mean(losses[-_AVERAGED:])), tokens=drawn)


class _Training:
    """What changes."""

    def __init__(
        self, student: Student, matrix: torch.Tensor, recipe: AlignRecipe, *, on_gpu: bool
    ) -> None:
        self.module = student.module
        self.parameters = {name: _leaf(name, p) for name, p in self.module.named_parameters()}
        self.output = _leaf("o.weight", matrix)
        self.leaves = [one.change for one in (*self.parameters.values(), self.output)]
        self.optimizer = torch.optim.AdamW(
            self.leaves,
            lr=recipe.learning_rate,
            betas=_BETAS,
            weight_decay=0.0,
            capturable=on_gpu,
        )
        self.rates = Rates(self.optimizer, matrix.device)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return |y - Z W|^2 / |y|^2 of rows [N, T, D]."""
        values = {name: one.value for name, one in self.parameters.items()}
        found = functional_call(self.module, values, (x,)) @ self.output.value
        return (found - y).square().sum() / y.square().sum()

    def update(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Take a step at the rates of now; return the loss before it."""
        with torch.enable_grad():
            loss = self.loss(x, y)
            self.optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.leaves, _CLIP)
        self.optimizer.step()
        return loss


def _leaf(name: str, parameter: torch.Tensor) -> _Leaf:
    base = parameter.detach().clone()
    return _Leaf(base, step_size(name, base), torch.zeros_like(base).requires_grad_())


def step_size(name: str, parameter: torch.Tensor) -> float:
    """Return what a learning rate is multiplied by for a parameter, by its name in the mixer."""
    scale = _ABSOLUTE.get(name)
    if scale is not None:
        return scale
    rms = float(parameter.square().mean().sqrt())
    return _OF_OWN_RMS.get(name, _OWN_RMS) * rms if rms > 0 else 1.0


def _share(step: int, steps: int) -> float:
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (step - _WARM_UP) / max(steps - _WARM_UP, 1))


def _batches(
    num_rows: int, length: int, recipe: AlignRecipe, *, seed: int
) -> Iterator[torch.Tensor]:
    """Yield the rows of every step: epochs in random order."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, min(recipe.tokens_per_step // length, num_rows))
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.steps):
        if len(left) < size:
            left = torch.cat((left, torch.randperm(num_rows, generator=generator)))
        yield left[:size]
        left = left[size:]


def _check(losses: list[float], recipe: AlignRecipe) -> None:
    most = _DIVERGED * max(losses[0], _NEAR)
    if not math.isfinite(losses[-1]) or _mean(losses[-_AVERAGED:]) > most:
        raise VerificationError(
            "alignment diverges",
            expected=f"a relative error of at most {most:.3g}",
            found=f"{losses[-1]:.3g} after {len(losses)} of {recipe.steps} steps",
            hint="Lower `align.learning_rate`; layers that are finished are kept.",
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
