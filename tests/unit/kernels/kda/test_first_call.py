"""The kernels of a first call are compiled side by side, and they are those that it launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.5")  # before, kernels compile as they are launched

FORWARD = {
    "fp16": {},
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "g in fp16": {"g_dtype": "float16"},
    "beta in fp16": {"beta_dtype": "float16"},
    "bounded law": {"gate": "bounded"},
    "prepared inputs": {"gate": None},
    "wide": {"dtype": "float32", "K": 256, "V": 256, "T": 64},
    "narrow": {"K": 16, "V": 24, "T": 33},
    "shared heads": {"H": 2, "HV": 6},
    "initial state": {"state": True},
    "packed": {"T": 100, "packed": [0, 30, 30, 100], "state": True},
    "one token": {"T": 1, "H": 1},
    "batch": {"B": 3, "T": 65},
}
CALLS = FORWARD | {f"{name}, gradients": {**c, "gradients": True} for name, c in FORWARD.items()}
# Sizes that are 1, multiples of 16 and neither, in every quantity that kernels are compiled for.
SIZES = [
    {"T": T, "B": B, "gradients": gradients}
    for gradients in (False, True)
    for B in (1, 4, 16)
    for T in (1, 16, 30, 64, 65, 128, 320, 256, 1024, 1025)
]
PACKED = [
    {"T": T, "packed": [0, *range(T - N + 1, T + 1)], "gradients": True}
    for N in (1, 2, 3, 16, 31)
    for T in (32, 64, 100, 1024)
]
TRAINS = {"gradients": True}
SCENARIOS = {
    **{name: {"calls": [call]} for name, call in CALLS.items()},
    "the same again": {"calls": [TRAINS, TRAINS]},
    "other sizes": {"calls": SIZES + PACKED},
    "other options": {"calls": list(CALLS.values())},
    "final state counts": {"calls": [{**TRAINS, "final": True}]},
    "threads fail": {"calls": [TRAINS], "fails": True},
    "Triton 3.4": {"calls": [TRAINS], "old": True},
}


def first_calls(scenarios, **environment):
    """What every call compiles and launches, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.kda.first_calls"],
        input=json.dumps(scenarios),
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return first_calls(SCENARIOS, CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("name", CALLS)
def test_what_a_first_call_launches_is_compiled_ahead_and_nothing_else(found, name):
    (call,) = found[name]
    assert call["late"] == []
    assert sorted(call["ahead"]) == sorted(set(call["launched"]))
    assert len({form.split()[0] for form in call["ahead"]}) == (
        5 if CALLS[name].get("gradients") else 2
    )


@pytest.mark.parametrize("name", ["other sizes", "other options"])
def test_no_later_call_waits_for_one_kernel_after_another(found, name):
    assert [call["late"] for call in found[name] if call["late"]] == []


def test_a_call_like_one_before_compiles_nothing(found):
    _, again = found["the same again"]
    assert (again["ahead"], again["late"]) == ([], [])
    assert again["launched"]


def test_only_the_gradient_of_the_final_state_is_not_foreseen(found):
    (call,) = found["final state counts"]
    assert [form.split()[0] for form in call["late"]] == ["kda_scan_backward_kernel"]


@pytest.mark.parametrize("name", ["threads fail", "Triton 3.4"])
def test_a_call_compiles_as_it_launches_where_it_cannot_ahead(found, name):
    (call,) = found[name]
    assert call["ahead"] == []
    assert call["late"] == call["launched"]


def test_no_thread_outlives_a_call(found):
    assert not any(call["threads"] for calls in found.values() for call in calls)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        {"gradients": True},
        {"dtype": "float32", "K": 128, "V": 128},
        {"dtype": "bfloat16", "K": 128, "V": 128, "gradients": True, "backend": None},
    ],
    ids=["Triton", "forward", "CUDA C++"],
)
def test_a_first_call_on_a_gpu_compiles_all_kernels_ahead(call, tmp_path):
    found = first_calls({"it": {"calls": [call, call]}}, TRITON_CACHE_DIR=str(tmp_path))
    first, second = found["it"]
    assert first["late"] == []
    assert {form for form in first["ahead"] if form.startswith("kda_scan")}
    assert (second["ahead"], second["late"]) == ([], [])
