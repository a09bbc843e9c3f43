"""The example's teacher and hybrid in ONNX Runtime give what our reference gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kimi_convert.checkpoints.examples import example_checkpoint, heldout_text
from kimi_convert.exporters.onnx.options import Target
from kimi_convert.exporters.onnx.picture import draw_layer
from kimi_convert.exporters.onnx.session import OnnxSession
from kimi_convert.model.loading import load_model
from kimi_convert.model.tokenizer import load_tokenizer
from tests.integration.command_line import run_here
from tests.unit.exporters.onnx.comparison import (
    FP32_BOUND,
    error,
    reference_run,
    run_pieces,
    state_errors,
)

PICTURES = Path(__file__).parents[2] / "docs" / "formats" / "onnx"
DECODED = 64
PIECES = {
    "prefill": (192,),
    "chunked": (1, 63, 65, 63),
    "64 decode steps": (128, *[1] * DECODED),
}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx-example") / "hybrid"
    done = run_here("convert", example_checkpoint(), output, "--no-text", "--quiet")
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def tokens():
    text = json.loads(heldout_text().read_text(encoding="utf-8").splitlines()[0])["text"]
    ids = load_tokenizer(example_checkpoint()).encode(text)[:192]
    return np.array([ids], dtype=np.int64)


@pytest.fixture(scope="module")
def exported(hybrid, tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx-exported") / "onnx"
    done = run_here("export", "onnx", hybrid, output, "--json")
    assert done.returncode == 0, done.stdout
    return OnnxSession(output, threads=1), load_model(hybrid)


@pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES)
def test_hybrid_logits_and_states_in_every_form(exported, tokens, sizes):
    session, model = exported
    wanted, cache = reference_run(model, tokens)
    logits, states = run_pieces(session, tokens, sizes)
    assert error(logits, wanted) <= FP32_BOUND
    assert max(state_errors(model, cache, states).values()) <= FP32_BOUND


def test_teacher_logits_and_states(tokens, tmp_path):
    done = run_here("export", "onnx", example_checkpoint(), tmp_path / "onnx", "--json")
    assert done.returncode == 0, done.stdout
    model = load_model(example_checkpoint(), dtype=torch.float32)
    wanted, cache = reference_run(model, tokens)
    logits, states = run_pieces(OnnxSession(tmp_path / "onnx", threads=1), tokens, (100, 92))
    assert error(logits, wanted) <= FP32_BOUND
    assert max(state_errors(model, cache, states).values()) <= FP32_BOUND


def test_int4_is_a_third_of_fp16_and_costs_little(tmp_path):
    sizes = {}
    for options in (("--precision", "fp16"), ("--quantize", "int4", "--text", heldout_text())):
        output = tmp_path / options[1]
        done = run_here("export", "onnx", example_checkpoint(), output, "--json", *options)
        document = json.loads(done.stdout)
        assert done.returncode == 0, document
        sizes[options[1]] = document["files"]["model.onnx.data"]
    assert sizes["int4"] <= 0.35 * sizes["fp16"]
    assert 0 < document["comparison"]["loss_increase"] < 0.05


@pytest.mark.parametrize("target", Target)
def test_pictures_of_the_docs_are_those_of_the_files(hybrid, tmp_path, target):
    done = run_here("export", "onnx", hybrid, tmp_path / "onnx", "--target", target, "--quiet")
    assert done.returncode == 0, done.stderr
    drawn = draw_layer(tmp_path / "onnx" / "model.onnx", 0)
    assert drawn == (PICTURES / f"kda-{target}.svg").read_text(encoding="utf-8")
