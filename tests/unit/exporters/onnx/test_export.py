"""Files of an export: what appears, what stays as it was, what is refused before a byte is written."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from kimi_convert.cli import main
from kimi_convert.errors import CheckpointError, OutputError, ResourceError, UsageError
from kimi_convert.exporters.onnx import export, options
from kimi_convert.exporters.onnx.export import export_onnx
from kimi_convert.exporters.onnx.options import (
    CustomBody,
    MoeForm,
    OnnxOptions,
    Quantization,
    Target,
    WeightPlacement,
)
from kimi_convert.exporters.onnx.session import OnnxSession
from kimi_convert.exporters.onnx.weights import external_tensor
from kimi_convert.exporters.safetensors import export_safetensors
from kimi_convert.model.loading import load_model
from kimi_convert.model.names.layout import expected_entries
from tests.quantized import write_twins
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.exporters.onnx.comparison import FP32_BOUND, error, reference_run

INPLACE = OnnxOptions(weights=WeightPlacement.INPLACE)


@pytest.fixture
def checkpoint(tmp_path):
    config = tiny_config("kimi_linear", num_hidden_layers=2)
    return write_tiny_checkpoint(tmp_path / "checkpoint", config, num_shards=1)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_weights_in_place_add_a_graph_and_copy_no_weight(checkpoint):
    before = files_of(checkpoint)
    result = export_onnx(checkpoint, checkpoint, options=INPLACE)
    after = files_of(checkpoint)
    graph, _ = after.pop("model.onnx"), after.pop("genai_config.json")
    assert after == before
    assert dict(result.files)["model.onnx"] == len(graph)
    held = onnx.load_model_from_string(graph).graph.initializer
    places = [{e.key: e.value for e in t.external_data} for t in held if t.external_data]
    assert {place["location"] for place in places} == {"model.safetensors"}


def test_copied_weights_lie_in_one_file_beside_the_graph(checkpoint, tmp_path):
    output = tmp_path / "onnx"
    result = export_onnx(checkpoint, output)
    assert files_of(output).keys() == {"genai_config.json", "model.onnx", "model.onnx.data"}
    assert {name: len(data) for name, data in files_of(output).items()} == dict(result.files)


@pytest.mark.parametrize("target", Target)
def test_the_same_export_gives_the_same_bytes(checkpoint, tmp_path, target):
    options = OnnxOptions(target=target)
    export_onnx(checkpoint, tmp_path / "one", options=options)
    export_onnx(checkpoint, tmp_path / "two", options=options)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_quantised_checkpoint_is_exported_from_the_plain_copy_that_is_named(tmp_path):
    quantised, _ = write_twins(tmp_path, "fp8")
    with pytest.raises(CheckpointError, match="quantised") as caught:
        export_onnx(quantised, tmp_path / "onnx")
    assert "export safetensors" in caught.value.hint
    export_safetensors(quantised, tmp_path / "copy")
    assert export_onnx(tmp_path / "copy", tmp_path / "onnx").files


def test_a_graph_that_is_there_stays(checkpoint):
    (checkpoint / "model.onnx").write_bytes(b"mine")
    before = files_of(checkpoint)
    with pytest.raises(OutputError, match="exists already"):
        export_onnx(checkpoint, checkpoint, options=INPLACE)
    assert files_of(checkpoint) == before


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_shard_that_is_a_link_is_refused_in_place(checkpoint, tmp_path, kind):
    shard = checkpoint / "model.safetensors"
    blob = tmp_path / "blob"
    shard.rename(blob)
    if kind == "symbolic":
        shard.symlink_to(blob)
    else:
        shard.hardlink_to(blob)
    before = files_of(checkpoint)
    with pytest.raises(CheckpointError, match="link") as caught:
        export_onnx(checkpoint, checkpoint, options=INPLACE)
    assert "--weights copy" in caught.value.hint
    assert files_of(checkpoint) == before
    export_onnx(checkpoint, tmp_path / "copied")


def test_experts_that_are_scattered_are_refused_in_place(tmp_path):
    config = tiny_config("kimi_linear", num_hidden_layers=2)
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", config, num_shards=30)
    with pytest.raises(CheckpointError, match="back to back"):
        export_onnx(checkpoint, checkpoint, options=INPLACE)
    assert "model.onnx" not in files_of(checkpoint)


def test_a_folder_that_cannot_be_written_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ResourceError, match="cannot write"):
        export_onnx(checkpoint, checkpoint, options=INPLACE)
    assert "model.onnx" not in files_of(checkpoint)


@pytest.mark.parametrize("options", [OnnxOptions(), INPLACE], ids=["copy", "inplace"])
def test_a_graph_that_the_checker_refuses_leaves_nothing(
    checkpoint, tmp_path, monkeypatch, options
):
    def refuse(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "check_file", refuse)
    inplace = options.weights is WeightPlacement.INPLACE
    before = files_of(checkpoint)
    output = tmp_path / "new" / "onnx"
    with pytest.raises(KeyboardInterrupt):
        export_onnx(checkpoint, checkpoint if inplace else output, options=options)
    assert files_of(checkpoint) == before
    assert not output.parent.exists()


@pytest.mark.parametrize(
    "choices",
    [
        {"custom_body": CustomBody.NESTED},
        {"moe": MoeForm.FUSED, "weights": WeightPlacement.INPLACE},
        {"moe": MoeForm.FUSED, "target": Target.ONNX27},
    ],
    ids=lambda choices: " ".join(choices),
)
def test_options_that_exclude_each_other_are_refused(choices):
    with pytest.raises(UsageError, match="cannot be had"):
        OnnxOptions(**choices)


def test_command_prints_one_document(checkpoint, capsys):
    code = main(["export", "onnx", str(checkpoint), "--weights", "inplace", "--json", "-q"])
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert document["weights"] == "inplace"
    assert document["files"].keys() == {"model.onnx", "genai_config.json"}
    assert document["functions"] == [
        "com.microsoft::LinearAttention",
        "com.microsoft::CausalConvWithState",
    ]


def test_command_asks_for_an_output_where_weights_are_copied(checkpoint, capsys):
    code = main(["export", "onnx", str(checkpoint), "--json"])
    assert code == 2
    assert "no output folder" in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"opset_version": 20}, "cannot be written at this opset"),
        ({"opset_version": 29}, "cannot be written at this opset"),
        ({"opset_version": 26, "target": Target.ONNX27}, "cannot be written at this opset"),
        ({"runtime": "1.24.1", "target": Target.ONNX27}, r"1\.24 does not load opset 27"),
        ({"runtime": "1.20", "opset_version": 23}, "does not load opset 23"),
        ({"runtime": "1.20", "moe": MoeForm.FUSED}, "does not load fused experts"),
        ({"runtime": "1.31", "quantize": Quantization.INT4}, "does not load integer weights"),
        ({"runtime": "1.19"}, "not a version of ONNX Runtime"),
        ({"runtime": "newest"}, "not a version of ONNX Runtime"),
    ],
    ids=lambda value: str(value),
)
def test_an_opset_or_runtime_that_does_not_fit_is_refused(choices, message):
    with pytest.raises(UsageError, match=message):
        OnnxOptions(**choices)


def test_an_old_runtime_gets_the_experts_that_it_can_run():
    assert OnnxOptions(runtime="1.20.1").moe_form is MoeForm.ACTIVE
    assert OnnxOptions(runtime="1.24").moe_form is MoeForm.FUSED


@pytest.mark.parametrize("opset", [21, 25, 28])
def test_graphs_are_written_at_the_opset_that_is_asked_for(checkpoint, tmp_path, opset):
    options = OnnxOptions(opset_version=opset)
    export_onnx(checkpoint, tmp_path / "onnx", options=options)
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert model.opset_import[0].version == opset
    session = OnnxSession(tmp_path / "onnx", threads=1)
    tokens = np.array([[5, 6, 7]])
    wanted, _ = reference_run(load_model(checkpoint), tokens)
    assert error(session.run(tokens, session.new_states(1)), wanted) <= FP32_BOUND


def test_a_graph_that_is_too_large_for_one_file_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(CheckpointError, match="too large for one file"):
        export_onnx(checkpoint, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_shard_in_another_folder_is_refused(checkpoint, capsys):
    (checkpoint / "part").mkdir()
    (checkpoint / "model.safetensors").rename(checkpoint / "part" / "model.safetensors")
    names = tiny_config("kimi_linear", num_hidden_layers=2)
    weight_map = {entry.name: "part/model.safetensors" for entry in expected_entries(names)}
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    code = main(["export", "onnx", str(checkpoint), "--weights", "inplace", "--json"])
    assert code == 3
    assert "part/model.safetensors" in json.loads(capsys.readouterr().out)["error"]["found"]
    assert not (checkpoint / "model.onnx").exists()


def test_external_data_has_no_path():
    with pytest.raises(CheckpointError, match="must lie beside it"):
        external_tensor("weight", "F32", (1,), file="../weights", start=0)


def test_missing_packages_are_named_with_what_to_install(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    code = main(["export", "onnx", str(checkpoint), "--weights", "inplace", "--json"])
    assert code == 2
    assert "kimi-convert[onnx]" in json.loads(capsys.readouterr().out)["error"]["hint"]


def test_a_checkpoint_that_does_not_validate_is_refused(checkpoint, tmp_path, capsys):
    document = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**document, "hidden_size": 48}))
    code = main(["export", "onnx", str(checkpoint), str(tmp_path / "onnx"), "--json"])
    assert code == 3
    assert "wrong shape" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--text", "missing.jsonl"), ("--last-logits", "--text", __file__)],
    ids=["no such text", "last logits"],
)
def test_a_text_that_cannot_be_run_is_refused_before_the_export(
    checkpoint, tmp_path, capsys, arguments
):
    output = tmp_path / "onnx"
    code = main(["export", "onnx", str(checkpoint), str(output), "--json", *arguments])
    assert code == 2
    assert "text" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not output.exists()
