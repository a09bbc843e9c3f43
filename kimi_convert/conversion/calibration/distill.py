"""Train all mixers of a hybrid together, towards the teacher's predictions: KL(teacher || student).

What is trained is rounded only at the end. The best state that validation tokens, which train
nothing, saw on the way is the result; it is taken only if it is nearer to the teacher than the
start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.calibration import DistillRecipe
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.calibration.captured import CapturedStep, Rates
from kimi_convert.conversion.calibration.distill_rows import StepRows
from kimi_convert.conversion.calibration.distill_state import DistillState
from kimi_convert.conversion.calibration.hybrid import Hybrid
from kimi_convert.conversion.calibration.outcome import Outcome, outcome_of
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.calibration.streams import batches
from kimi_convert.conversion.calibration.written_text import written_rows
from kimi_convert.errors import VerificationError
from kimi_convert.model.language_model import Head

_STAGE = "distilling"
_WRITTEN = "written"
_SAVE_EVERY = 100  # steps
_LOOKS = 8  # at the validation tokens, over the whole training
_WARM_UP_SHARE = 0.03
_FINAL_RATE = 0.02  # of the learning rate
_BETAS = (0.9, 0.95)
_CLIP = 1.0
_HEAD_TOKENS = 4096  # whose logits exist at a time
_AVERAGED = 10
_SIZES_PER_OCTAVE = 4  # steps of parameters whose sizes are near share an optimizer group


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillInput:
    """What is trained, on what."""

    tokens: torch.Tensor  # [N, T], drawn from
    check: torch.Tensor  # [n, T + 1], judged on
    teacher: ModelConfig
    recipe: DistillRecipe
    seed: int


def distill(
    hybrid: Hybrid,
    given: DistillInput,
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> Mapping[str, object]:
    """Train a hybrid in place; go on from the store's last state, if it has one.

    Returns:
        What to note: losses, validation on the way, before and after, whether the result was taken.

    Raises:
        VerificationError: the loss is not finite; the last saved state is kept.
    """
    before = validate(hybrid, given.check)
    start = {name: value.detach().clone() for name, value in hybrid.trained().items()}
    given = replace(given, tokens=_with_written(hybrid, given, store, on_progress))
    state = DistillState(hybrid, _optimizer(hybrid, given.recipe), store)
    _Training(hybrid, given, state, on_progress).run()
    _fill(hybrid, {name: hybrid.rounded(name, best) for name, best in state.best.items()})
    after = validate(hybrid, given.check)
    taken = hybrid.ranks.agreed(after.kl - before.kl, hybrid.device) < 0
    if not taken:
        _fill(hybrid, start)
    return {
        "steps": given.recipe.steps,
        "losses": [_mean(state.losses[:_AVERAGED]), _mean(state.losses[-_AVERAGED:])],
        "looks": state.looks,
        "before": before.to_json(),
        "after": after.to_json(),
        "taken": taken,
    }


def outcome_from(note: Mapping[str, object]) -> Outcome:
    """Return the outcome of the hybrid that a distillation left."""
    scores = note["after"] if note["taken"] else note["before"]
    assert isinstance(scores, dict)
    return Outcome(**scores)


def outcome_before(note: Mapping[str, object]) -> Outcome:
    """Return the outcome of the hybrid before a distillation."""
    scores = note["before"]
    assert isinstance(scores, dict)
    return Outcome(**scores)


@torch.no_grad()
def validate(hybrid: Hybrid, check: torch.Tensor) -> Outcome:
    """Compare both models on rows [n, T + 1]."""
    inputs = check[:, :-1].to(hybrid.device)
    guide = torch.cat([hybrid.run_teacher(inputs[rows]) for rows in batches(len(inputs))])
    stream = torch.cat([hybrid.run(inputs[rows]) for rows in batches(len(inputs))])
    return outcome_of(
        hybrid.teacher_ends.head, guide, stream, check, student_head=hybrid.ends.head
    )


def _with_written(
    hybrid: Hybrid, given: DistillInput, store: CalibrationStore, on_progress: ProgressCallback
) -> torch.Tensor:
    """Return the rows to draw from, with those that the teacher writes."""
    rows = given.recipe.written_tokens // given.tokens.shape[1]
    if not rows:
        return given.tokens
    if not store.has(_WRITTEN):
        ranks = hybrid.ranks
        written = written_rows(
            hybrid.write,
            given.teacher,
            given.tokens,
            rows=rows,
            seed=given.seed,
            device=hybrid.device,
            on_progress=on_progress,
        )
        if ranks.is_first:
            store.save(_WRITTEN, {"rows": written}, {})
        ranks.wait()  # all take what the first one wrote
    return torch.cat((given.tokens, store.tensor(_WRITTEN, "rows")))


class _Training:
    """The steps."""

    def __init__(
        self,
        hybrid: Hybrid,
        given: DistillInput,
        state: DistillState,
        on_progress: ProgressCallback,
    ) -> None:
        self.hybrid, self.given, self.state = hybrid, given, state
        self.on_progress = on_progress
        self.rates = Rates(state.optimizer, hybrid.device)
        self.leaves = list(hybrid.trained().values())
        self.captured = CapturedStep(self._update, hybrid.device)
        self.unread: list[torch.Tensor] = []  # losses that nobody has waited for

    def run(self) -> None:
        """Take every step that the state has not taken."""
        steps, state = self.given.recipe.steps, self.state
        size = self.given.recipe.tokens_per_step // self.given.tokens.shape[1]
        ranks, device = self.hybrid.ranks, self.hybrid.device
        size = max(size // ranks.size, 1) * ranks.size  # so that all have as many
        rows = StepRows(self.given.tokens, rows_per_step=size, seed=self.given.seed)
        look_every = max(1, steps // _LOOKS)
        for step in range(len(state.losses), steps):
            self.on_progress(ProgressEvent(_STAGE, step, steps, "steps", state.last_look))
            self._step(step, ranks.share(rows.of(step)).to(device))
            done = step + 1
            if done % look_every == 0 or done == steps:
                self._read_losses()
                state.look(done, ranks.agreed(validate(self.hybrid, self.given.check).kl, device))
            if done % _SAVE_EVERY == 0:
                self._read_losses()
                state.save()
        self.on_progress(ProgressEvent(_STAGE, steps, steps, "steps"))

    def _step(self, step: int, tokens: torch.Tensor) -> None:
        self.rates.scale(_schedule(step, self.given.recipe.steps))
        take = self.captured if self.hybrid.repeats_itself(tokens) else self._update
        self.unread.append(take(tokens).detach())

    def _update(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take a step at the rates of now; return its loss."""
        with torch.enable_grad():
            loss = _loss(self.hybrid, tokens)
            self.state.optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(self.leaves, _CLIP)
        self.state.optimizer.step()
        return loss

    def _read_losses(self) -> None:
        """Wait for the device; not after each step, which would leave it idle."""
        if not self.unread:
            return
        found = self.hybrid.ranks.mean(torch.stack(self.unread)).cpu().tolist()
        self.unread.clear()
        for loss in found:
            self.state.losses.append(loss)
            if not math.isfinite(loss):
                raise VerificationError(
                    "distillation diverges",
                    found=f"a loss of {loss} after {len(self.state.losses)} of "
                    f"{self.given.recipe.steps} steps",
                    hint="Lower `distill.learning_rate`; the last saved state is kept.",
                )


def _optimizer(hybrid: Hybrid, recipe: DistillRecipe) -> torch.optim.Optimizer:
    groups: dict[float, list[nn.Parameter]] = {}
    for name, value in hybrid.trained().items():
        octave = round(_SIZES_PER_OCTAVE * math.log2(hybrid.step_size(name))) / _SIZES_PER_OCTAVE
        groups.setdefault(2.0**octave, []).append(value)
    return torch.optim.AdamW(
        [
            {"params": values, "lr": recipe.learning_rate * size}
            for size, values in sorted(groups.items())
        ],
        betas=_BETAS,
        weight_decay=0.0,
        fused=hybrid.device.type == "cuda",
        capturable=hybrid.device.type == "cuda",
    )


def _loss(hybrid: Hybrid, tokens: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) in nats per token."""
    guide = hybrid.run_teacher(tokens).flatten(0, 1)
    stream = hybrid.run(tokens).flatten(0, 1)
    total = stream.new_zeros(())
    for expected, found in zip(guide.split(_HEAD_TOKENS), stream.split(_HEAD_TOKENS), strict=True):
        total = total + checkpoint(
            _divergence,
            hybrid.teacher_ends.head,
            hybrid.ends.head,
            expected,
            found,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total / len(stream)


def _divergence(
    teacher_head: Head, head: Head, guide: torch.Tensor, stream: torch.Tensor
) -> torch.Tensor:
    expected = teacher_head(guide).log_softmax(-1)
    found = head(stream).log_softmax(-1)
    return (expected.exp() * (expected - found)).sum()


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, round(_WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1))
    return _FINAL_RATE + (1 - _FINAL_RATE) * cosine


@torch.no_grad()
def _fill(hybrid: Hybrid, values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in hybrid.trained().items():
        parameter.copy_(values[name])


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)
