"""FLA's parameter sets run through our functions, and a result that is off is found.

In Triton's interpreter where there is no GPU, with shapes cut down for it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from kimi_convert.bench import fla_cases
from kimi_convert.bench.fla_adapter import FlaOptions, Ours, oracle
from kimi_convert.bench.fla_case import Allowed, Beta, Form, Shape
from kimi_convert.bench.fla_parameters import FLA_CASES
from kimi_convert.bench.fla_run import run_case
from kimi_convert.kernels.backend import Backend
from kimi_convert.kernels.kda import recurrent_kda
from tests.unit.kernels.devices import DEVICE, ON_GPU

pytest.importorskip("triton")
# See tests/unit/kernels/kda/test_chunk_triton.py.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def tiny(case):
    """The case with a shape that the interpreter takes a second for."""
    _, T, H, HV, D = case.shape
    offsets = tuple(range(3)) if case.form is Form.DECODE else (0, 2, 5) if case.offsets else ()
    T = offsets[-1] if offsets else min(T, 5)
    dtype = "float16" if case.dtype == "bfloat16" else case.dtype
    shape = Shape(1, T, 1, HV // H, min(D, 16))
    return replace(case, shape=shape, offsets=offsets, dtype=dtype)


FIRST = {case.test: case for case in reversed(FLA_CASES)}


@pytest.mark.parametrize("test", FIRST)
def test_one_of_each_of_its_tests_is_within_its_bounds(test):
    rows = run_case(tiny(FIRST[test]), torch.device(DEVICE), with_fla=False)
    assert rows
    assert [row for row in rows if not row.passed] == []


def test_every_parameter_set_is_there_once():
    assert Counter(case.test for case in FLA_CASES) == {
        "naive_chunk": 6,
        "fused_recurrent": 6,
        "fused_recurrent_use_beta_sigmoid_in_kernel": 3,
        "fused_recurrent_state_v_first": 4,
        "fused_recurrent_gate_in_kernel": 7,
        "fused_recurrent_vllm_decode": 6,
        "chunk": 16,
        "chunk_state_v_first": 4,
        "chunk_use_beta_sigmoid_in_kernel": 3,
        "chunk_varlen": 6,
        "chunk_varlen_prefill": 5,
        "gate": 14,
        "flash_kda_chunk": 3,
        "flash_kda_chunk_varlen": 3,
    }
    assert all(FLA_CASES.count(case) == 1 for case in FLA_CASES)


def tensors(T=70, H=2, HV=4, D=4):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, T, H, D, dtype=torch.float64)
    v, g = torch.randn(2, 1, T, HV, D, dtype=torch.float64)
    beta = torch.randn(1, T, HV, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


OPTIONS = FlaOptions(
    output_final_state=True,
    use_qk_l2norm_in_kernel=True,
    use_gate_in_kernel=True,
    use_beta_sigmoid_in_kernel=True,
    lower_bound=-5.0,
)
PLAIN = Ours(recurrent=True, backend=Backend.TORCH)


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        replace(OPTIONS, A_log=torch.ones(1, 1, 4, 1).double(), dt_bias=torch.ones(16).double()),
        replace(OPTIONS, cu_seqlens=torch.tensor([0, 3, 3, 70]), scale=0.5),
        replace(OPTIONS, initial_state=torch.ones(1, 4, 4, 4).double().tril()),
    ],
    ids=["bare", "gate", "packed", "state"],
)
def test_the_oracle_is_our_recurrence_and_so_are_its_gradients(options):
    found, expected = [], []
    for function, results in ((oracle, found), (PLAIN, expected)):
        leaves = tensors()
        output, state = function(*leaves, options)
        seed = torch.linspace(-1, 1, output.numel()).double()
        gradients = torch.autograd.grad((output.flatten() * seed).sum() + state.sum(), leaves)
        results.extend((output.detach(), state.detach(), *gradients))
    torch.testing.assert_close(found, expected)


def test_doubled_beta_is_twice_the_sigmoid():
    q, k, v, g, beta = (x.detach() for x in tensors(T=5))
    options = replace(OPTIONS, allow_neg_eigval=True, use_gate_in_kernel=False)
    output, _ = oracle(q, k, v, -g.abs(), beta, options)
    plain, _ = recurrent_kda(q, k, v, -g.abs(), 2 * beta.sigmoid(), qk_norm=True)
    torch.testing.assert_close(output, plain)
    # Ours takes the sigmoid in fp32, as FLA does.
    output, _ = PLAIN(*(x.float() for x in (q, k, v, -g.abs(), beta)), options)
    torch.testing.assert_close(output, plain.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [oracle, PLAIN], ids=["oracle", "ours"])
def test_states_turn_with_the_layout_that_is_asked_for(function):
    leaves = [x.detach() for x in tensors(T=5)]
    state = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    options = replace(OPTIONS, initial_state=state)
    turned = replace(OPTIONS, initial_state=state.mT.contiguous(), state_v_first=True)
    output, last = function(*leaves, options)
    turned_output, turned_last = function(*leaves, turned)
    assert torch.equal(turned_output, output)
    assert torch.equal(turned_last.mT, last)
    assert function(*leaves, replace(options, output_final_state=False))[1] is None


def test_twins_say_the_same_in_another_way():
    for case in FLA_CASES:
        if case.against_twin is not None:
            assert case.twin is not None
            assert (case.twin.state_v_first, case.twin.beta) in (
                (False, Beta.GIVEN),
                (False, Beta.OUTSIDE),
            )


# In fp16, whose rounding of the output is far above what counts as nothing.
RECURRENT = tiny(FIRST["fused_recurrent_vllm_decode"])


def allowing(error, **options):
    return replace(RECURRENT, allowed=Allowed({"o": error, "ht": 0.1}, **options))


def test_main_prints_a_table_and_writes_all_numbers(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fla_cases, "CASES", (RECURRENT, tiny(FIRST["gate"])))
    file = tmp_path / "out.json"
    arguments = ["--case", "recurrent", "--without-fla", "--json", str(file)]
    assert fla_cases.main(arguments) == 0
    printed = capsys.readouterr().out
    assert RECURRENT.name in printed
    assert "1 cases, 2 results of ours: 2 within bounds" in printed
    assert [row["result"] for row in json.loads(file.read_text())] == ["o", "ht"]


def test_a_miss_is_said_and_is_exit_code_6(monkeypatch, capsys):
    monkeypatch.setattr(fla_cases, "CASES", (allowing(1e-12),))
    assert fla_cases.main(["--without-fla"]) == 6
    printed = capsys.readouterr().out
    assert "(> 1.0e-12)" in printed
    assert f"1 within bounds; missed: {RECURRENT.name} o" in printed


def test_what_its_tests_only_warn_of_does_not_count(monkeypatch, capsys):
    case = allowing(1e-12, only_warned_of=frozenset(("o",)))
    monkeypatch.setattr(fla_cases, "CASES", (case,))
    assert fla_cases.main(["--without-fla"]) == 0
    assert "[> 1.0e-12]" in capsys.readouterr().out


def test_values_that_are_not_finite_are_missed(monkeypatch):
    def spoilt(*args, **kwargs):
        output, state = recurrent_kda(*args, **kwargs)
        return output * torch.nan, state

    monkeypatch.setattr("kimi_convert.bench.fla_adapter.recurrent_kda", spoilt)
    rows = run_case(RECURRENT, torch.device(DEVICE), with_fla=False)
    assert {row.result: row.passed for row in rows} == {"o": False, "ht": True}


def test_a_case_that_is_not_there_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        fla_cases.main(["--case", "nothing of the kind"])
    assert stopped.value.code == 2
    assert "chunk_varlen" in capsys.readouterr().err


@pytest.mark.skipif(ON_GPU, reason="a GPU runs it")
def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert fla_cases.main([]) == 3
    assert "need a CUDA device" in capsys.readouterr().err
