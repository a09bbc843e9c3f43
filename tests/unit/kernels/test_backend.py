from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from kimi_convert.kernels.backend import launching_on


@pytest.fixture
def second_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_nothing_is_switched_where_the_device_is_the_current_one(device, second_gpu):
    assert isinstance(launching_on(torch.device(device)), nullcontext)


def test_another_gpu_is_made_the_current_one(second_gpu):
    context = launching_on(torch.device("cuda:0"))
    assert isinstance(context, torch.cuda.device)
    assert context.idx == 0
