"""On a GPU: whole models on every backend, in every form and dtype, and what the commands make of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kimi_convert.checkpoints.examples import example_checkpoint, heldout_text
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ignore_progress
from kimi_convert.kernels.backend import Backend
from kimi_convert.model.kda import KdaForm
from kimi_convert.model.text import PackedText
from kimi_convert.validation import ValidationOptions, validate_checkpoint
from kimi_convert.validation.bounds import coarsest, error_bound, tie_margin
from kimi_convert.validation.estimate import estimate_validation
from kimi_convert.validation.memory_need import memory_need, require_room
from kimi_convert.validation.parity.compare import compare_traces
from kimi_convert.validation.parity.greedy import compare_greedy
from kimi_convert.validation.parity.process_runners import FlaRunner
from kimi_convert.validation.parity.run import ParityOptions, compare_implementations
from kimi_convert.validation.parity.torch_model import (
    TorchRun,
    continue_greedily,
    single_tokens,
    trace_checkpoint,
    uneven_pieces,
)
from kimi_convert.validation.quality import measure_quality
from tests.tiny import linear_attn_config, tiny_config, write_tiny_checkpoint

pytestmark = pytest.mark.gpu

TOKENS = torch.randint(96, (2, 150), generator=torch.Generator().manual_seed(3))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = {
    "prefill": TorchRun(device="cuda"),
    "recurrent": TorchRun(device="cuda", kda_form=KdaForm.RECURRENT),
    "pieces": TorchRun(device="cuda", pieces=uneven_pieces),
    "decode": TorchRun(device="cuda", kda_form=KdaForm.RECURRENT, pieces=single_tokens),
}
# None takes the fastest: for heads of 128 in bf16 and fp16 partly CUDA C++.
BACKENDS = {"torch": Backend.TORCH, "triton": Backend.TRITON, "fastest": None}
RELEASED_HEADS = linear_attn_config(4, num_heads=2, head_dim=128)
# What `validate` compares with its chunked prefill where Triton runs.
OTHER_FORMS = {
    "recurrent prefill",
    "prefill in pieces",
    "decode token by token",
    "prefill in plain torch",
}


@pytest.fixture(scope="module", params=["tiny", "heads-of-128", "example"])
def checkpoint(request, tiny_hybrid, example_hybrid, tmp_path_factory):
    if request.param == "heads-of-128":
        config = tiny_config("kimi_linear", linear_attn_config=RELEASED_HEADS)
        return write_tiny_checkpoint(tmp_path_factory.mktemp("heads") / "c", config, seed=9)
    return {"tiny": tiny_hybrid, "example": example_hybrid}[request.param]


@pytest.fixture(scope="module")
def reference(checkpoint):
    """Plain torch, in fp32, on the CPU."""
    return trace_checkpoint(checkpoint, TOKENS, TorchRun())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_model_on_a_gpu_agrees_with_torch_on_the_cpu(checkpoint, reference, backend, form, dtype):
    run = replace(form, backend=backend, dtype=dtype)
    found = trace_checkpoint(checkpoint, TOKENS, run, follow=reference)
    result = compare_traces(found, reference, dtype=dtype, config=read_config(checkpoint))
    assert result.passed, (result.failures, result.location)
    assert result.logits.relative_error > 0  # it did run on something else
    assert result.states.keys() == set(range(read_config(checkpoint).num_layers))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_greedy_continuation_on_triton_is_that_of_torch(checkpoint, dtype):
    prompt = TOKENS[0, :16].tolist()
    run = TorchRun(device="cuda", backend=Backend.TRITON, dtype=dtype)
    found, expected = (continue_greedily(checkpoint, prompt, 32, r) for r in (run, TorchRun()))
    bound = error_bound(coarsest((dtype, torch.float32)), read_config(checkpoint).num_layers)
    assert compare_greedy(found, expected, bound=bound).passed


@pytest.fixture(scope="module")
def validated(example_hybrid):
    """Return a function that validates the example with a teacher and text on a device."""

    def on(device, dtype="float32"):
        return validate_checkpoint(
            example_hybrid,
            teacher=example_checkpoint(),
            text=heldout_text(),
            options=ValidationOptions(
                device=device, dtype=dtype, max_tokens=2048, sequence_length=256
            ),
        )

    return on


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_validate_compares_both_backends_by_itself(validated, dtype):
    report = validated("cuda", dtype)
    assert report.passed, report.findings
    errors = {form.form: form.max_relative_error for form in report.consistency.forms}
    assert errors.keys() == OTHER_FORMS
    assert errors["prefill in plain torch"] > 0  # it did run on something else


def test_validate_measures_on_a_gpu_what_it_measures_on_a_cpu(validated, example_hybrid):
    found, expected = (validated(device).quality for device in ("cuda", "cpu"))
    num_layers = read_config(example_hybrid).num_layers
    largest = trace_checkpoint(example_hybrid, TOKENS, TorchRun()).logits.abs().max().item()
    # A loss moves by at most twice what a logit does.
    moved = tie_margin(error_bound(torch.float32, num_layers), largest)
    for name in ("student", "teacher", "ablated"):
        one, other = (getattr(quality, name).overall for quality in (found, expected))
        assert abs(one.loss - other.loss) <= moved
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.hidden == pytest.approx(other.hidden, rel=1e-3)


def test_parity_runs_the_triton_row(checkpoint):
    options = ParityOptions(against=("triton",), tokens=100, new_tokens=32)
    report = compare_implementations(checkpoint, options=options)
    (found,) = report.implementations
    assert report.passed, found
    assert found.name == "triton"
    assert found.greedy is not None
    assert found.greedy.tokens == 32
    assert found.comparison.logits.relative_error > 0


def test_layers_of_flash_linear_attention_agree(checkpoint):
    problem: Any = SimpleNamespace(config=read_config(checkpoint))
    if reason := FlaRunner().why_not(problem):
        pytest.skip(reason)
    options = ParityOptions(against=("fla",), tokens=100, new_tokens=32)
    report = compare_implementations(checkpoint, options=options)
    assert report.passed, (report.absent, report.implementations)
    assert [one.name for one in report.implementations] == ["fla, prefill", "fla, decode"]
    assert all(one.comparison.logits.relative_error > 0 for one in report.implementations)


def test_estimate_is_of_the_gpu(example_hybrid):
    config, found = read_config(example_hybrid), {}
    for device in ("cuda", "cpu"):
        options = ValidationOptions(device=device)
        need = memory_need([config], options, text_tokens=0)
        found[device] = estimate_validation(
            [example_hybrid], [config], options, memory=need, text_tokens=0
        )
        require_room(need, where=example_hybrid)
    assert found["cuda"].memory.memory_bytes < found["cpu"].memory.memory_bytes
    assert found["cuda"].operations_per_second > found["cpu"].operations_per_second


def test_hidden_states_in_files_give_the_same_report(example_hybrid):
    tokens = torch.randint(96, (5, 65), generator=torch.Generator().manual_seed(8))
    in_memory, in_files = (
        measure_quality(
            example_hybrid,
            PackedText(tokens=tokens, kinds=("a",) * 5, left_over={}),
            teacher=example_checkpoint(),
            options=ValidationOptions(device="cuda", batch_rows=2),
            on_progress=ignore_progress,
            on_disk=on_disk,
        )
        for on_disk in (False, True)
    )
    assert in_files.student.overall.loss == pytest.approx(in_memory.student.overall.loss, rel=1e-6)
    for one, other in zip(in_files.layers, in_memory.layers, strict=True):
        assert one.hidden == pytest.approx(other.hidden, rel=1e-3)
