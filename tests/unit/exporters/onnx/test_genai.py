"""onnxruntime-genai finds the states by their names and writes what our own model writes."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime_genai
import pytest

from kimi_convert.exporters.onnx.export import export_onnx
from kimi_convert.exporters.onnx.options import (
    MlaForm,
    OnnxOptions,
    Precision,
    Quantization,
    Target,
)
from kimi_convert.exporters.onnx.session import OnnxSession
from kimi_convert.model.generation import generate
from kimi_convert.model.loading import load_model
from tests.tiny import linear_attn_config, tiny_config, write_tiny_checkpoint

PROMPT = [5, 17, 33, 4, 90, 41, 8]
NEW_TOKENS = 24
FORMS = {
    "all logits": ({}, OnnxOptions()),
    "last logits": ({}, OnnxOptions(last_logits=True)),
    "custom": ({}, OnnxOptions(target=Target.CUSTOM)),
    "onnx27": ({}, OnnxOptions(target=Target.ONNX27)),
    "values wider than keys": ({"v_head_dim": 40}, OnnxOptions()),
    "MLA first": (
        {"num_hidden_layers": 3, "linear_attn_config": linear_attn_config(3, (0,))},
        OnnxOptions(),
    ),
}


def genai_tokens(folder, prompt, count):
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


@pytest.mark.parametrize(("fields", "options"), FORMS.values(), ids=FORMS)
def test_genai_writes_the_same_tokens(tmp_path, fields, options):
    config = tiny_config("kimi_linear", **{"eos_token_id": 95, **fields})
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", config)
    export_onnx(checkpoint, tmp_path / "onnx", options=options)
    wanted = list(generate(load_model(checkpoint), PROMPT, max_new_tokens=NEW_TOKENS))
    assert len(set(wanted)) > NEW_TOKENS // 3  # not one token again and again
    assert genai_tokens(tmp_path / "onnx", PROMPT, NEW_TOKENS) == wanted


@pytest.mark.parametrize(
    "options",
    [OnnxOptions(precision=Precision.FP16), OnnxOptions(quantize=Quantization.INT4)],
    ids=["fp16", "int4"],
)
def test_genai_writes_what_onnx_runtime_alone_writes(tmp_path, options):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    config = tiny_config("kimi_linear", eos_token_id=95, **sizes)
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", config)
    export_onnx(checkpoint, tmp_path / "onnx", options=options)
    session = OnnxSession(tmp_path / "onnx", threads=1)
    states = session.new_states(1)
    tokens, wanted = np.array([PROMPT]), []
    for _ in range(NEW_TOKENS):
        tokens = session.run(tokens, states)[:, -1:].argmax(-1)
        wanted.append(int(tokens[0, 0]))
    assert genai_tokens(tmp_path / "onnx", PROMPT, NEW_TOKENS) == wanted


def test_latents_come_without_a_config_that_genai_could_not_run(tmp_path):
    config = tiny_config("kimi_linear", num_hidden_layers=2)
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", config)
    export_onnx(checkpoint, tmp_path / "onnx", options=OnnxOptions(mla=MlaForm.LATENT))
    assert not (tmp_path / "onnx" / "genai_config.json").exists()


def test_config_names_one_width_for_keys_and_values(tmp_path):
    config = tiny_config("kimi_linear", num_hidden_layers=2, v_head_dim=40)
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", config)
    export_onnx(checkpoint, tmp_path / "onnx")
    document = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert document["model"]["decoder"]["head_size"] == 40
