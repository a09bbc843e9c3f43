"""The timing of kernels runs anywhere, and its numbers mean what they say."""

from __future__ import annotations

import json

import pytest
import torch

from kimi_convert.bench import kernels
from kimi_convert.bench.conv_norm_cases import (
    CONV_NORM_CASES,
    ConvNormCase,
    Op,
    conv_norm_peers,
)
from kimi_convert.bench.kernel_cases import CASES, Case, GateKind, Work, make_inputs
from kimi_convert.bench.kernel_peers import peers

CPU = torch.device("cpu")


def small(work, gates=GateKind.INITIAL):
    return Case(work=work, B=2, T=1 if work is Work.DECODE else 8, H=1, gates=gates)


@pytest.mark.parametrize("work", list(Work))
def test_every_kind_of_work_is_timed(work):
    timings = kernels.measure([small(work)], CPU)
    assert [timing.who for timing in timings] == ["torch"]
    assert timings[0].eager_ms > 0
    assert timings[0].graph_ms is None
    assert timings[0].best_ms == timings[0].eager_ms


@pytest.mark.parametrize(
    ("gates", "weakest", "strongest"),
    [
        (GateKind.INITIAL, -2.0, 0.0),
        (GateKind.STEEP, -200.0, -1.0),
        (GateKind.BOUNDED, -5.0, 0.0),
    ],
)
def test_gates_are_as_strong_as_their_name_says(gates, weakest, strongest):
    inputs = make_inputs(Case(work=Work.PREFILL, B=1, T=64, H=4, gates=gates), CPU)
    decay = inputs.gate.log_decay(inputs.f)
    assert weakest <= decay.min() < strongest
    assert decay.max() <= 0


def test_inputs_are_the_same_each_time():
    case = small(Work.PREFILL)
    first, second = (make_inputs(case, CPU).tensors() for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_training_returns_the_gradient_of_every_input():
    case = small(Work.TRAINING)
    inputs = make_inputs(case, CPU)
    gradients = peers(case, inputs)["torch"]()
    assert [x.shape for x in gradients] == [x.shape for x in inputs.tensors()]


def test_floor_counts_every_tensor_once():
    rows, wide = 1024 * 32, 128
    values = rows * (5 * wide + 1)  # q, k, v, f and the output; beta
    assert CASES[0].floor_bytes == 2 * values + 4 * 32 * wide * wide


def test_main_prints_a_table_and_writes_all_numbers(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "CASES", (small(Work.PREFILL), small(Work.DECODE)))
    assert kernels.main(["--case", "prefill", "--json", str(tmp_path / "out.json")]) == 0
    assert "x1.00" in capsys.readouterr().out
    (timing,) = json.loads((tmp_path / "out.json").read_text())
    assert timing["who"] == "torch"


def test_a_case_that_is_not_there_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        kernels.main(["--case", "nothing of the kind"])
    assert stopped.value.code == 2
    assert "prefill B=1 T=1024" in capsys.readouterr().err


def conv_norm(op, work):
    return ConvNormCase(op=op, work=work, B=2, T=1 if work is Work.DECODE else 3, H=1)


CONV_NORM_KINDS = sorted({(case.op, case.work) for case in CONV_NORM_CASES})


@pytest.mark.parametrize(("op", "work"), CONV_NORM_KINDS, ids=str)
def test_every_kind_of_convolution_and_norm_is_timed(op, work):
    timings = kernels.measure([conv_norm(op, work)], CPU)
    whose = {
        (Op.CONV, Work.PREFILL): ["torch", "conv1d"],
        (Op.CONV, Work.TRAINING): ["torch", "conv1d"],
        (Op.RMS, Work.PREFILL): ["torch", "aten"],
        (Op.RMS, Work.TRAINING): ["torch", "aten"],
    }
    assert [timing.who for timing in timings] == whose.get((op, work), ["torch"])
    assert all(timing.eager_ms > 0 for timing in timings)


@pytest.mark.parametrize("op", [Op.CONV, Op.RMS])
@pytest.mark.parametrize("work", [Work.PREFILL, Work.TRAINING])
def test_peers_compute_the_same(op, work):
    first, *others = (call() for call in conv_norm_peers(conv_norm(op, work), CPU).values())
    assert others
    for other in others:
        for found, expected in zip(other, first, strict=True):
            bound = 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
            assert (found - expected).abs().max() <= bound


@pytest.mark.parametrize(
    ("op", "work", "tensors"),
    [
        (Op.CONV, Work.PREFILL, 2),
        (Op.CONV, Work.TRAINING, 5),  # x, y; x, dy, dx
        (Op.GATED, Work.TRAINING, 8),  # x, gate, y; x, gate, dy, dx, dgate
        (Op.L2, Work.PREFILL, 2),
    ],
)
def test_floor_of_convolutions_and_norms_counts_every_tensor_once(op, work, tensors):
    streams, states = (3, 3 * 2 * 128 * 3 * 2) if op is Op.CONV else (1, 0)
    assert conv_norm(op, work).floor_bytes == 2 * tensors * streams * 2 * 3 * 128 + states


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "work"), CONV_NORM_KINDS, ids=str)
def test_ours_is_timed_on_a_gpu(op, work):
    timings = kernels.measure([conv_norm(op, work)], torch.device("cuda"))
    assert timings[0].who == "ours"
    assert timings[0].graph_ms is not None or work is Work.TRAINING
