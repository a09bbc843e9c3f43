"""Train all mixers of a hybrid together, towards the teacher's predictions: KL(teacher || student).

Everything but the mixers is the teacher's own and frozen, so one copy of it serves both models.
Layers are run again in the backward pass instead of keeping their activations. What is trained is
rounded only at the end; the result is taken only if it is nearer to the teacher on tokens that
trained nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kimi_convert.config.calibration import DistillRecipe
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.calibration.align import step_size
from kimi_convert.conversion.calibration.outcome import Outcome, outcome_of
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.calibration.streams import batches
from kimi_convert.conversion.calibration.students import Student
from kimi_convert.errors import VerificationError
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.language_model import Head

_STAGE = "distilling"
_STATE = "distill-state"
_SAVE_EVERY = 100  # steps
_WARM_UP_SHARE = 0.03
_FINAL_RATE = 0.05  # of the learning rate
_BETAS = (0.9, 0.95)
_CLIP = 1.0
_HEAD_TOKENS = 2048  # whose logits exist at a time
_AVERAGED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillInput:
    """What is trained, on what."""

    tokens: torch.Tensor  # [N, T], drawn from
    check: torch.Tensor  # [n, T + 1], judged on
    recipe: DistillRecipe
    seed: int


class Hybrid:
    """A student whose every layer shares its feed-forward with the teacher."""

    def __init__(
        self,
        embed: nn.Embedding,
        layers: list[DecoderLayer],
        head: Head,
        students: list[Student],
        matrices: list[torch.Tensor],
    ) -> None:
        """Take over modules and output matrices [F, D]; the matrices become parameters."""
        self.embed, self.layers, self.head, self.students = embed, layers, head, students
        self.matrices = [nn.Parameter(matrix.clone()) for matrix in matrices]
        for student in students:
            student.module.requires_grad_()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained: "3.kda.q.weight" and so on, "3.kda.o.weight" as [F, D]."""
        found: dict[str, nn.Parameter] = {}
        for n, (student, matrix) in enumerate(zip(self.students, self.matrices, strict=True)):
            for name, parameter in student.module.named_parameters():
                found[f"{n}.{student.prefix}{name}"] = parameter
            found[f"{n}.{student.prefix}o.weight"] = matrix
        return found

    def stored(self, layer_idx: int) -> dict[str, torch.Tensor]:
        """Return one layer's parameters as a checkpoint names and shapes them."""
        start = f"{layer_idx}."
        found = {
            name.removeprefix(start): value.detach()
            for name, value in self.parameters().items()
            if name.startswith(start)
        }
        return {n: v.T if n.endswith(".o.weight") else v for n, v in found.items()}

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the student's last hidden states [B, T, D]."""
        hidden = self.embed(tokens).float()
        for n in range(len(self.layers)):
            hidden = checkpoint(self._layer, n, hidden, use_reentrant=False)
        return hidden

    @torch.no_grad()
    def run_teacher(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the teacher's last hidden states [B, T, D]."""
        hidden = self.embed(tokens).float()
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def _layer(self, n: int, hidden: torch.Tensor) -> torch.Tensor:
        layer = self.layers[n]
        mixed = self.students[n].module(layer.input_norm(hidden)) @ self.matrices[n]
        hidden = hidden + mixed
        return hidden + layer.feed_forward(hidden)


def distill(
    hybrid: Hybrid,
    given: DistillInput,
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> Mapping[str, object]:
    """Train a hybrid in place; go on from the store's last state, if it has one.

    Returns:
        What to note: losses, validation before and after, whether the result was taken.

    Raises:
        VerificationError: the loss is not finite; the last saved state is kept.
    """
    before = validate(hybrid, given.check)
    parameters = hybrid.parameters()
    start = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [value], "lr": given.recipe.learning_rate * _size(name, value)}
            for name, value in parameters.items()
        ],
        betas=_BETAS,
        weight_decay=0.0,
    )
    losses = _train(hybrid, given, optimizer, store, on_progress)
    for name, value in parameters.items():
        value.data.copy_(_stored(hybrid, name, value.detach()))
    after = validate(hybrid, given.check)
    taken = after.kl < before.kl
    if not taken:
        for name, value in parameters.items():
            value.data.copy_(start[name])
    return {
        "steps": given.recipe.steps,
        "losses": [_mean(losses[:_AVERAGED]), _mean(losses[-_AVERAGED:])],
        "before": before.to_json(),
        "after": after.to_json(),
        "taken": taken,
    }


def outcome_from(note: Mapping[str, object]) -> Outcome:
    """Return the outcome of the hybrid that a distillation left."""
    scores = note["after"] if note["taken"] else note["before"]
    assert isinstance(scores, dict)
    return Outcome(**scores)


@torch.no_grad()
def validate(hybrid: Hybrid, check: torch.Tensor) -> Outcome:
    """Compare both models on rows [n, T + 1]."""
    device = hybrid.embed.weight.device
    inputs = check[:, :-1].to(device)
    guide = torch.cat([hybrid.run_teacher(inputs[rows]) for rows in batches(len(inputs))])
    stream = torch.cat([hybrid.run(inputs[rows]) for rows in batches(len(inputs))])
    return outcome_of(hybrid.head, guide, stream, check)


def _train(
    hybrid: Hybrid,
    given: DistillInput,
    optimizer: torch.optim.Optimizer,
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> list[float]:
    recipe, device = given.recipe, hybrid.embed.weight.device
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    leaves = list(hybrid.parameters().values())
    losses = _resume(hybrid, optimizer, store)
    for step, rows in enumerate(_batches(given, first=len(losses)), start=len(losses)):
        on_progress(ProgressEvent(_STAGE, step, recipe.steps, "steps"))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(step, recipe.steps)
        with torch.enable_grad(), _autocast(device):
            loss = _loss(hybrid, given.tokens[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(leaves, _CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise VerificationError(
                "distillation diverges",
                found=f"a loss of {losses[-1]} after {step + 1} of {recipe.steps} steps",
                hint="Lower `distill.learning_rate`; the last saved state is kept.",
            )
        if (step + 1) % _SAVE_EVERY == 0:
            _save(hybrid, optimizer, losses, store)
    on_progress(ProgressEvent(_STAGE, recipe.steps, recipe.steps, "steps"))
    return losses


def _loss(hybrid: Hybrid, tokens: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) in nats per token."""
    guide = hybrid.run_teacher(tokens).flatten(0, 1)
    stream = hybrid.run(tokens).flatten(0, 1)
    total = stream.new_zeros(())
    for part in torch.arange(len(stream), device=stream.device).split(_HEAD_TOKENS):
        total = total + checkpoint(
            _divergence, hybrid.head, guide[part], stream[part], use_reentrant=False
        )
    return total / len(stream)


def _divergence(head: Head, guide: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    expected = head(guide).float().log_softmax(-1)
    found = head(stream).float().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum()


def _batches(given: DistillInput, *, first: int) -> Iterator[torch.Tensor]:
    """Yield the rows of every step from `first` on; a step's rows do not depend on what ran."""
    num_rows, length = given.tokens.shape
    size = max(1, min(given.recipe.tokens_per_step // length, num_rows))
    per_epoch = num_rows // size
    for step in range(first, given.recipe.steps):
        generator = torch.Generator().manual_seed(1_000_003 * given.seed + step // per_epoch)
        order = torch.randperm(num_rows, generator=generator)
        at = size * (step % per_epoch)
        yield order[at : at + size]


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, round(_WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1))
    return _FINAL_RATE + (1 - _FINAL_RATE) * cosine


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _size(name: str, value: torch.Tensor) -> float:
    return step_size(name.split(".", 2)[2], value.detach())


def _stored(hybrid: Hybrid, name: str, value: torch.Tensor) -> torch.Tensor:
    layer, _, leaf = name.split(".", 2)
    return hybrid.students[int(layer)].rounded(leaf, value)


def _save(
    hybrid: Hybrid, optimizer: torch.optim.Optimizer, losses: list[float], store: CalibrationStore
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, value in hybrid.parameters().items():
        state = optimizer.state[value]
        tensors |= {f"{name}:{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        tensors[f"{name}:value"] = value
    store.save(_STATE, tensors, {"losses": losses})


def _resume(
    hybrid: Hybrid, optimizer: torch.optim.Optimizer, store: CalibrationStore
) -> list[float]:
    """Take over the last saved state; return the losses up to it."""
    if not store.has(_STATE):
        return []
    tensors, losses = store.tensors(_STATE), store.record(_STATE)["losses"]
    assert isinstance(losses, list)
    for name, value in hybrid.parameters().items():
        value.data.copy_(tensors[f"{name}:value"])
        optimizer.state[value] = {
            "step": torch.tensor(float(len(losses))),
            **{
                key: tensors[f"{name}:{key}"].to(value.device) for key in ("exp_avg", "exp_avg_sq")
            },
        }
    return [float(loss) for loss in losses]


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)
