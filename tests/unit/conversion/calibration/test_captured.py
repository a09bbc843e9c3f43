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


def _trained(device: torch.device, take: _Step, rates: Rates, model: nn.Linear) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for n in range(_STEPS):
        rates.scale(1 - n / _STEPS)
        x, y = (torch.randn(16, d, generator=generator, dtype=torch.float64) for d in (8, 4))
        losses.append(take(x.to(device), y.to(device)).detach())
    return [*torch.stack(losses).tolist(), *model.weight.flatten().tolist()]


def test_on_a_cpu_a_step_is_only_called():
    cpu = torch.device("cpu")
    model, step, rates = _training(cpu)
    expected = _trained(cpu, step, rates, model)
    model, step, rates = _training(cpu)
    take = CapturedStep(step, cpu)
    assert _trained(cpu, take, rates, model) == expected
    assert not take.replays


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
def test_replays_train_as_the_steps_they_replace():
    cuda = torch.device("cuda")
    model, step, rates = _training(cuda)
    expected = _trained(cuda, step, rates, model)
    model, step, rates = _training(cuda)
    take = CapturedStep(step, cuda)
    found = _trained(cuda, take, rates, model)
    assert take.replays
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_steps_that_wait_for_the_device_are_taken_as_they_are():
    cuda = torch.device("cuda")
    model, step, rates = _training(cuda)
    expected = _trained(cuda, step, rates, model)
    model, step, rates = _training(cuda)

    def waits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert float(x.sum()) != 0
        return step(x, y)

    take = CapturedStep(waits, cuda)
    found = _trained(cuda, take, rates, model)
    assert not take.replays
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=1e-12)
