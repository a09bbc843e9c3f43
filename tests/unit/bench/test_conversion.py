"""The measurements of conversions, on models of some kilobytes: real programs, real bytes."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from kimi_convert.bench import conversion
from kimi_convert.bench.process_cost import run_measured
from kimi_convert.bench.released_files import released_files
from kimi_convert.bench.released_shapes import MODELS, shaped_tensors, write_shaped_checkpoint
from kimi_convert.checkpoints.dtypes import torch_dtype
from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.config.huggingface import config_to_json, parse_config, read_config
from kimi_convert.config.quantization import fp8_quantization
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion import plan_conversion
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.errors import ConfigError, VerificationError
from kimi_convert.model.names.layout import expected_entries
from tests.golden.test_released_models import KIMI_K2_PUBLISHED_TENSORS, config_of
from tests.tiny import tiny_config

TINY = config_to_json(tiny_config("deepseek_v3", dtype="bfloat16"))
TINY_FP8 = {**TINY, "quantization_config": fp8_quantization()}
GOLDEN = {"moonlight": "moonlight-16b-a3b", "kimi-k2": "kimi-k2-instruct"}


@pytest.mark.parametrize("model", GOLDEN)
def test_shapes_are_those_of_the_released_config(model):
    ours, released = parse_config(MODELS[model]), config_of(GOLDEN[model])
    shapes = [
        [(entry.name, entry.shape) for entry in expected_entries(config)]
        for config in (ours, released)
    ]
    assert shapes[0] == shapes[1]


def test_kimi_k2_has_as_many_tensors_and_bytes_as_were_published():
    tensors = list(shaped_tensors(parse_config(MODELS["kimi-k2"])))
    assert len(tensors) == KIMI_K2_PUBLISHED_TENSORS
    assert round(sum(tensor.nbytes for tensor in tensors) / 2**30, 1) == 958.5


def test_moonlight_has_the_parameters_of_its_model_card():
    config = parse_config(MODELS["moonlight"])
    sizes = {entry.param: math.prod(entry.shape) for entry in expected_entries(config)}
    embeddings = sizes.pop("embed.weight") + sizes.pop("head.weight")
    assert embeddings == 2 * 163840 * 2048
    assert round(sum(sizes.values()) / 1e9, 2) == 15.29


@pytest.mark.parametrize("quantised", [False, True])
def test_holes_take_no_room_and_read_as_zeros(quantised, tmp_path):
    document = {**TINY, "hidden_size": 512, "vocab_size": 8192, "intermediate_size": 2048}
    if quantised:
        document["quantization_config"] = fp8_quantization()
    source = write_shaped_checkpoint(tmp_path / "source", document)
    index = open_index(source)
    assert index.nbytes > 10_000_000
    assert sum(path.stat().st_blocks * 512 for path in source.iterdir()) < 1_000_000
    with CheckpointReader(index) as reader:
        assert not reader.tensor("model.embed_tokens.weight").any()
    assert read_config(source) == parse_config(document)


@pytest.mark.parametrize("quantised", [False, True])
def test_filled_checkpoint_converts(quantised, tmp_path):
    document = dict(TINY)
    if quantised:
        document["quantization_config"] = fp8_quantization()
    source = write_shaped_checkpoint(tmp_path / "source", document, filled_bytes=10**9)
    with CheckpointReader(open_index(source)) as reader:
        for name in reader.index.tensors:
            assert reader.tensor(name).float().isfinite().all()
            assert reader.tensor(name).float().any()
    convert_checkpoint(source, tmp_path / "out")


def test_folder_that_exists_is_not_written_into(tmp_path):
    with pytest.raises(FileExistsError):
        write_shaped_checkpoint(tmp_path, TINY)


def measured(capsys, folder, *arguments):
    assert conversion.main(["--folder", str(folder), *arguments]) == 0
    assert list(folder.iterdir()) == []
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def tiny_models(monkeypatch):
    models = {"moonlight": TINY, "kimi-k2": TINY_FP8, "deepseek-v3": TINY}
    monkeypatch.setattr(conversion, "MODELS", models)


@pytest.mark.slow
def test_speed_compares_pairs(tiny_models, tmp_path, capsys):
    found = measured(
        capsys, tmp_path, "speed", "--layers", "2", "--pairs", "1", "--rest", "0", "--fp8"
    )
    (pair,) = found["pairs"]
    assert pair["ratio"] == pytest.approx(pair["cp_seconds"] / pair["convert_seconds"])
    assert found["median_ratio"] == pair["ratio"]
    assert pair["peak_bytes"] > 50e6


@pytest.mark.slow
def test_memory_is_that_of_files_of_every_kind(tiny_models, tmp_path, capsys):
    found = measured(capsys, tmp_path, "memory", "kimi-k2")
    assert (found["files"], found["of_files"]) == (1, 1)
    assert found["peak_bytes"] > 50e6
    assert found["planned_peak_bytes"] > 0
    plan_bytes = plan_conversion(
        write_shaped_checkpoint(tmp_path / "again", TINY_FP8), Recipe(), max_shard_bytes=10**9
    ).write_bytes
    assert found["written_bytes"] == plan_bytes


@pytest.mark.slow
def test_whole_model_is_converted_and_removed(tiny_models, tmp_path, capsys):
    found = measured(capsys, tmp_path, "memory", "moonlight", "--whole")
    assert found["peak_bytes"] > 50e6
    assert found["seconds"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["moonlight", "kimi-k2"])
def test_shared_part_is_told_for_several_sizes(tiny_models, tmp_path, capsys, model):
    found = measured(capsys, tmp_path, "shared", model)
    assert found["dtype"] == {"moonlight": "source", "kimi-k2": "fp8"}[model]
    assert found["5GB"]["files"] == 1
    assert 0 < found["5GB"]["copied"] < 1
    assert found["5GB"]["shared"] == 0  # for kilobytes no file is laid out anew


def test_released_files_hold_a_layer_each_in_the_order_of_the_library(tmp_path):
    plan = released_files("kimi-k2", TINY_FP8)
    layers = [{t.name.split(".")[2] for t in shard.tensors} for shard in plan.shards[1:5]]
    assert layers == [{str(layer)} for layer in range(4)]
    folder = write_shaped_checkpoint(tmp_path / "shaped", TINY_FP8, files=plan)
    tensors = open_index(folder).tensors
    assert {t.name for t in shaped_tensors(parse_config(TINY_FP8))} == set(tensors)
    for shard in plan.shards:
        like = {t.name: torch.zeros(t.shape, dtype=torch_dtype(t.dtype)) for t in shard.tensors}
        save_file(like, tmp_path / "theirs", {"format": "pt"})
        assert (folder / shard.file_name).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_plan_and_inspect_are_timed(tiny_models, tmp_path, capsys):
    found = measured(capsys, tmp_path, "plan", "moonlight")
    for command in ("plan", "inspect"):
        assert found[command]["processor_seconds"] > 0
        assert found[command]["seconds"] > 0


def test_program_that_fails_is_told(tmp_path):
    with pytest.raises(VerificationError, match="measured failed") as caught:
        run_measured((sys.executable, "-c", "raise SystemExit(7)"))
    assert caught.value.found == "7"


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (ConfigError("no"), 3), (OSError(28, "x"), 5)]
)
def test_failures_have_their_exit_codes(error, code, tmp_path, monkeypatch, capsys):
    def fail(folder, options):
        raise error

    monkeypatch.setattr(conversion, "_MEASURES", {"plan": fail})
    assert conversion.main(["--folder", str(tmp_path), "plan", "moonlight"]) == code
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_a_resource_error(tmp_path):
    assert conversion.main(["--folder", str(tmp_path / "missing"), "plan", "moonlight"]) == 5


def test_measuring_loads_no_torch():
    code = "import sys, kimi_convert.bench.conversion; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
