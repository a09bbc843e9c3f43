"""Every model in every form, dtype and file format: one reference, the bounds of one table.

The reference is one chunked prefill in fp32 of the checkpoint as it was written. What it is worth
itself is the business of `tests/oracles` and of `test_matrix.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kimi_convert.config.huggingface import read_config
from kimi_convert.exporters.safetensors import export_safetensors
from kimi_convert.kernels.backend import Backend
from kimi_convert.model.kda import KdaForm
from kimi_convert.validation.bounds import coarsest
from kimi_convert.validation.parity.artifacts import rounded_dtype
from kimi_convert.validation.parity.compare import compare_traces
from kimi_convert.validation.parity.greedy import compare_greedy
from kimi_convert.validation.parity.torch_model import (
    TorchRun,
    continue_greedily,
    single_tokens,
    trace_checkpoint,
    uneven_pieces,
)
from tests.parity.models import MODELS, model
from tests.tiny import write_tiny_checkpoint

TOKENS = torch.randint(96, (2, 37), generator=torch.Generator().manual_seed(0))
REFERENCE = TorchRun()
RECURRENT = TorchRun(kda_form=KdaForm.RECURRENT)
RUNS = {
    "recurrent": RECURRENT,
    "pieces": TorchRun(pieces=uneven_pieces),
    "decode": replace(RECURRENT, pieces=single_tokens),
    "fp64": TorchRun(dtype=torch.float64),
    "bf16": TorchRun(dtype=torch.bfloat16),
    "bf16-decode": replace(RECURRENT, pieces=single_tokens, dtype=torch.bfloat16),
    "fp16": TorchRun(dtype=torch.float16),
}
FORMATS = {
    "one-file": {"max_shard_bytes": 10**9},
    "many-files": {"max_shard_bytes": 40_000},
    "bf16-weights": {"dtype": "bfloat16"},
    "fp16-weights": {"dtype": "float16"},
    "fp32-weights": {"dtype": "float32"},
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    return write_tiny_checkpoint(folder, model(request.param), seed=6)


@pytest.fixture(scope="module")
def reference(checkpoint):
    return trace_checkpoint(checkpoint, TOKENS, REFERENCE)


def assert_agrees(folder, run, reference, *, rounded=None):
    found = trace_checkpoint(folder, TOKENS.to(run.device), run, follow=reference)
    result = compare_traces(
        found,
        reference,
        dtype=coarsest(filter(None, (run.dtype, rounded))),
        config=read_config(folder),
    )
    assert result.passed, (result.failures, result.location)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_form_and_dtype_agree_with_a_prefill(checkpoint, reference, run):
    assert_agrees(checkpoint, run, reference)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_files_written_again_agree(checkpoint, reference, options, tmp_path):
    artifact = tmp_path / "artifact"
    export_safetensors(checkpoint, artifact, **options)
    rounded = rounded_dtype(checkpoint, read_config(checkpoint), artifact)
    assert (rounded is None) == (options.get("dtype") in (None, "float32"))
    assert_agrees(artifact, REFERENCE, reference, rounded=rounded)


@pytest.mark.parametrize("length", [1, 5, 16])
def test_greedy_continuation_is_equal_in_fp64(checkpoint, length):
    prompt = TOKENS[0, :length].tolist()
    found, expected = (
        continue_greedily(checkpoint, prompt, 12, run) for run in (RUNS["fp64"], REFERENCE)
    )
    assert compare_greedy(found, expected, bound=1e-5).passed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_triton_agrees_with_torch_on_the_cpu(checkpoint, reference, dtype):
    run = TorchRun(backend=Backend.TRITON, device="cuda", dtype=dtype)
    assert_agrees(checkpoint, run, reference)
