from __future__ import annotations

import torch

from kimi_convert.validation.environment import this_environment


def test_report_names_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"H{number}00")
    assert this_environment().gpus == ("H000", "H100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert this_environment().gpus == ()
