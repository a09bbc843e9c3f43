"""A picture holds the operators, weights and states of one layer, and follows the file."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from kimi_convert.errors import CheckpointError
from kimi_convert.exporters.onnx import picture
from kimi_convert.exporters.onnx.export import export_onnx
from kimi_convert.exporters.onnx.options import OnnxOptions, Target
from tests.tiny import tiny_config, write_tiny_checkpoint

TARGETS = {
    Target.ORT: ("com.microsoft::LinearAttention", "com.microsoft::CausalConvWithState"),
    Target.ONNX27: ("LinearAttention", "CausalConvWithState"),
    Target.CUSTOM: ("ai.kimi::KimiDeltaAttention", "ai.kimi::KimiShortConv weight"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("picture")
    return write_tiny_checkpoint(folder, tiny_config("kimi_linear", num_hidden_layers=2))


def lines_of(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text]


@pytest.mark.parametrize("target", Target)
def test_picture_shows_a_kda_layer_of_every_target(checkpoint, tmp_path, target):
    export_onnx(checkpoint, tmp_path / "onnx", options=OnnxOptions(target=target))
    lines = lines_of(picture.draw_layer(tmp_path / "onnx" / "model.onnx", 0))
    recurrence, convolution = TARGETS[target]
    for wanted in (recurrence, convolution.split()[0], "Gemm q_proj.weight", "Gemm o_proj.weight"):
        assert lines.count(wanted) == 1, wanted
    states = [f"{kind}.0.{state}" for kind in ("past_key_values", "present") for state in STATES]
    assert set(states) <= set(lines)


STATES = ("conv_state", "recurrent_state")


def test_boxes_stand_below_what_they_read(checkpoint, tmp_path):
    export_onnx(checkpoint, tmp_path / "onnx")
    root = ElementTree.fromstring(picture.draw_layer(tmp_path / "onnx" / "model.onnx", 0))
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        start, *_, end = path.attrib["d"].replace("M", "").replace("C", "").split()[1::2]
        assert float(start) < float(end)


def test_mla_layers_are_drawn_too(checkpoint, tmp_path):
    export_onnx(checkpoint, tmp_path / "onnx")
    output = tmp_path / "mla.svg"
    arguments = [str(tmp_path / "onnx" / "model.onnx"), "1", str(output), "--mixer", "mla"]
    assert picture.main(arguments) == 0
    assert "Softmax" in " ".join(lines_of(output.read_text()))


def test_a_layer_that_is_not_there_is_one_clear_error(checkpoint, tmp_path, capsys):
    export_onnx(checkpoint, tmp_path / "onnx")
    model = tmp_path / "onnx" / "model.onnx"
    assert picture.main([str(model), "7", str(tmp_path / "x.svg")]) == 3
    assert "no kda mixer in layer 7" in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="not an ONNX file"):
        picture.draw_layer(tmp_path / "model.onnx", 0)
