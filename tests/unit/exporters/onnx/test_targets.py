"""Every target gives the same numbers, in ONNX Runtime and in the reference evaluator."""

from __future__ import annotations

import tomllib
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import onnx
import onnxruntime_extensions
import pytest
from onnx.reference import ReferenceEvaluator

from kimi_convert.exporters.onnx.export import export_onnx
from kimi_convert.exporters.onnx.options import (
    CustomBody,
    MlaForm,
    MoeForm,
    OnnxOptions,
    Target,
)
from kimi_convert.exporters.onnx.reference_operators import REFERENCE_OPERATORS
from kimi_convert.exporters.onnx.session import OnnxSession
from kimi_convert.model.loading import load_model
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.exporters.onnx.comparison import (
    FP32_BOUND,
    error,
    reference_run,
    run_pieces,
    state_errors,
)

ROOT = Path(__file__).parents[4]
TARGETS = {
    "ort": OnnxOptions(),
    "ort, latent MLA": OnnxOptions(mla=MlaForm.LATENT),
    "ort, active experts": OnnxOptions(moe=MoeForm.ACTIVE),
    "onnx27": OnnxOptions(target=Target.ONNX27),
    "custom, portable": OnnxOptions(target=Target.CUSTOM),
    "custom, nested": OnnxOptions(target=Target.CUSTOM, custom_body=CustomBody.NESTED),
}
# com.microsoft::MoE is ONNX Runtime's alone.
EVALUATED = {name: TARGETS[name] for name in TARGETS if TARGETS[name].moe_form is MoeForm.ACTIVE}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    write_tiny_checkpoint(folder, tiny_config("kimi_linear", num_hidden_layers=2))
    return folder, load_model(folder)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 90, (2, 9))


@pytest.fixture(scope="module")
def exported(hybrid, tmp_path_factory):
    """Return the folder of an export with given options; each is made once."""
    made = {}

    def export(options):
        if options not in made:
            folder = tmp_path_factory.mktemp("exported") / "onnx"
            export_onnx(hybrid[0], folder, options=options)
            made[options] = folder
        return made[options]

    return export


@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS)
def test_onnx_runtime_gives_the_reference_s_logits_and_states(hybrid, exported, tokens, options):
    _, model = hybrid
    wanted, cache = reference_run(model, tokens)
    logits, states = run_pieces(OnnxSession(exported(options), threads=1), tokens, (1, 5, 2, 1))
    assert error(logits, wanted) <= FP32_BOUND
    assert max(state_errors(model, cache, states).values()) <= FP32_BOUND


@pytest.mark.parametrize("options", EVALUATED.values(), ids=EVALUATED)
def test_reference_evaluator_gives_the_same_without_any_kernel(hybrid, exported, tokens, options):
    _, model = hybrid
    wanted, _ = reference_run(model, tokens)
    assert error(evaluated(exported(options), tokens), wanted) <= FP32_BOUND


def test_reference_operators_take_the_place_of_the_bodies(hybrid, exported, tokens):
    _, model = hybrid
    wanted, _ = reference_run(model, tokens)
    seen = []

    class Noted(REFERENCE_OPERATORS[0]):
        op_domain = "ai.kimi"

        def _run(self, *inputs, num_heads, scale):
            seen.append(num_heads)
            return super()._run(*inputs, num_heads=num_heads, scale=scale)

    Noted.__name__ = "KimiDeltaAttention"
    folder = exported(TARGETS["custom, portable"])
    logits = evaluated(folder, tokens, new_ops=[Noted, REFERENCE_OPERATORS[1]])
    assert seen == [4]
    assert error(logits, wanted) <= FP32_BOUND


def test_entry_point_names_the_reference_operators():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = project["entry-points"]["onnx.reference_ops"]["ai.kimi"]
    assert resolve_name(named) is REFERENCE_OPERATORS


def test_a_registered_kernel_takes_the_place_of_the_body(exported, tokens):
    calls = []

    @onnxruntime_extensions.onnx_op(
        op_type="ai.kimi::KimiDeltaAttention",
        inputs=[onnxruntime_extensions.PyCustomOpDef.dt_float] * 6,
        outputs=[onnxruntime_extensions.PyCustomOpDef.dt_float] * 2,
        attrs={
            "num_heads": onnxruntime_extensions.PyCustomOpDef.dt_int64,
            "scale": onnxruntime_extensions.PyCustomOpDef.dt_float,
        },
    )
    def silent(q, k, v, g, beta, state, num_heads, scale):
        calls.append((num_heads, scale))
        return np.zeros_like(v), state

    folder = exported(TARGETS["custom, portable"])
    library = onnxruntime_extensions.get_library_path()
    registered = OnnxSession(folder, threads=1, libraries=(library,))
    states = registered.new_states(2)
    registered.run(tokens, states)
    assert calls == [(4, 0.25)]
    assert not states.values["past_key_values.0.recurrent_state"].numpy().any()


@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS)
def test_a_file_names_no_more_than_its_target_allows(exported, options):
    model = onnx.load(exported(options) / "model.onnx", load_external_data=False)
    versions = {imported.domain: imported.version for imported in model.opset_import}
    assert versions.pop("") == options.opset
    allowed = {Target.ORT: {"com.microsoft"}, Target.ONNX27: set(), Target.CUSTOM: {"ai.kimi"}}
    nested = {"com.microsoft"} if options.custom_body is CustomBody.NESTED else set()
    assert set(versions) == allowed[options.target] | nested
    assert all(version == 1 for version in versions.values())
    for function in model.functions:
        assert {entry.domain: entry.version for entry in function.opset_import}[
            ""
        ] == options.opset


@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS)
def test_a_file_says_what_its_inputs_and_operators_are(exported, options):
    model = onnx.load(exported(options) / "model.onnx", load_external_data=False)
    assert "attention_mask [B, S]" in model.doc_string
    for function in model.functions:
        assert "scale S_t^T q" in function.doc_string or "[C, 1, W]" in function.doc_string


def evaluated(folder, tokens, new_ops=()):
    """Return logits of the reference evaluator."""
    evaluator = ReferenceEvaluator(str(folder / "model.onnx"), new_ops=list(new_ops))
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    for value in evaluator.proto_.graph.input:
        if value.name not in feeds:
            dims = value.type.tensor_type.shape.dim[1:]
            feeds[value.name] = np.zeros((len(tokens), *(dim.dim_value for dim in dims)), "f4")
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))["logits"]
