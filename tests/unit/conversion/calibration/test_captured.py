"""A captured step trains as the step itself does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from kimi_convert.conversion.calibration.captured import CapturedStep, Rates

_STEPS = 8
_Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _training(device: torch.device) -> tuple[nn.Linear, _Step, Rates]:
    torch.manual_seed(0)
    model = nn.Linear(8, 4, dtype=torch.float64).to(device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.01}],
        fused=on_gpu,
        capturable=on_gpu,
    )

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return model, step, Rates(optimizer, device)


def _same(step: _Step) -> _Step:
    return step


def _trained(device: torch.device, wrap: Callable[[_Step], _Step] = _same) -> list[float]:
    """Train from the same start on the same draws; return losses and weights."""
    model, step, rates = _training(device)
    take = wrap(step)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for n in range(_STEPS):
        rates.scale(1 - n / _STEPS)
        x, y = (torch.randn(16, d, generator=generator, dtype=torch.float64) for d in (8, 4))
        losses.append(take(x.to(device), y.to(device)).detach())
    return [*torch.stack(losses).tolist(), *model.weight.flatten().tolist()]


def _captured(device: torch.device, *, waits: bool = False) -> tuple[list[float], bool]:
    """Train with captured steps; say whether they were replayed."""
    made: list[CapturedStep] = []

    def wrap(step: _Step) -> CapturedStep:
        def waiting(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            assert float(x.sum()) != 0
            return step(x, y)

        made.append(CapturedStep(waiting if waits else step, device))
        return made[0]

    return _trained(device, wrap), made[0].replays


def test_on_a_cpu_a_step_is_only_called():
    cpu = torch.device("cpu")
    assert _captured(cpu) == (_trained(cpu), False)


def test_rates_are_shares_of_what_the_groups_began_with():
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": [parameters[0]], "lr": 0.5}, {"params": [parameters[1]], "lr": 0.25}], lr=1
    )
    rates = Rates(optimizer, torch.device("cpu"))
    for share in (0.5, 1.0, 0.25):
        rates.scale(share)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * share, 0.25 * share]


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [False, True], ids=["replayed", "waits for the device"])
def test_on_a_gpu_captured_steps_train_as_the_steps_themselves(waits):
    cuda = torch.device("cuda")
    found, replayed = _captured(cuda, waits=waits)
    assert replayed != waits  # a step that waits cannot be captured, and is taken as it is
    expected = torch.tensor(_trained(cuda))
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-9, atol=1e-12)
