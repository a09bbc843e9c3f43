"""The memory measurement, on a model of some kilobytes: sparse sources, real conversions."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from kimi_convert.bench import convert_memory
from kimi_convert.bench.convert_memory import (
    MOONLIGHT,
    ConvertMemory,
    measure_conversion,
    write_sparse_checkpoint,
)
from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.config.huggingface import config_to_json, parse_config, read_config
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion import plan_conversion
from kimi_convert.errors import ConfigError, VerificationError
from kimi_convert.model.names.layout import expected_entries
from tests.tiny import tiny_config

TINY = config_to_json(tiny_config("deepseek_v3", dtype="bfloat16"))


def test_source_is_whole_to_a_reader_and_nothing_on_disk(tmp_path):
    document = {**TINY, "hidden_size": 512, "vocab_size": 8192, "intermediate_size": 2048}
    write_sparse_checkpoint(tmp_path / "source", document)
    index = open_index(tmp_path / "source")
    assert index.nbytes > 25_000_000
    blocks = sum(path.stat().st_blocks * 512 for path in (tmp_path / "source").iterdir())
    assert blocks < 1_000_000
    with CheckpointReader(index) as reader:
        assert not reader.tensor("model.embed_tokens.weight").any()
    assert read_config(tmp_path / "source") == parse_config(document)
    assert plan_conversion(tmp_path / "source").read_bytes == index.nbytes


def test_config_is_moonlights():
    config = parse_config(MOONLIGHT)
    sizes = {entry.param: math.prod(entry.shape) for entry in expected_entries(config)}
    # The model card: 15.29 B parameters without the embeddings.
    embeddings = sizes.pop("embed.weight") + sizes.pop("head.weight")
    assert embeddings == 2 * 163840 * 2048
    assert round(sum(sizes.values()) / 1e9, 2) == 15.29


def test_folder_that_exists_is_not_written_into(tmp_path):
    with pytest.raises(FileExistsError):
        write_sparse_checkpoint(tmp_path, TINY)


def test_measured_conversion_is_a_real_one(tmp_path):
    measured = measure_conversion(tmp_path, TINY)
    plan = plan_conversion(tmp_path / "source", Recipe())
    assert measured.read_bytes == plan.read_bytes
    assert measured.planned_peak_bytes == plan.peak_memory_bytes
    assert measured.written_bytes == sum(
        path.stat().st_size for path in (tmp_path / "output").glob("*.safetensors")
    )
    # Python and torch take a hundred megabytes; this process, which has loaded more, does not
    # count. A wrong unit would be off by a factor 1024.
    assert 50e6 < measured.peak_bytes < 2e9
    assert 0 < measured.seconds < 60
    assert (tmp_path / "output" / "conversion.json").is_file()


def test_failing_conversion_is_not_a_measurement(tmp_path, capfd):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "notes.txt").write_text("mine")
    with pytest.raises(VerificationError, match="failed") as caught:
        measure_conversion(tmp_path, TINY)
    assert caught.value.found == "3"
    said = capfd.readouterr()
    assert "not empty" in said.err + (tmp_path / "result.json").read_text()


def test_model_that_cannot_be_converted_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="heads"):
        measure_conversion(tmp_path, {**TINY, "v_head_dim": 32})


def test_speed_is_of_bytes_written():
    measured = ConvertMemory(
        read_bytes=1, written_bytes=6 * 10**6, planned_peak_bytes=2, peak_bytes=3, seconds=1.5
    )
    assert measured.to_json() == {
        "read_bytes": 1,
        "written_bytes": 6 * 10**6,
        "planned_peak_bytes": 2,
        "peak_bytes": 3,
        "seconds": 1.5,
        "megabytes_per_second": 4.0,
    }


@pytest.fixture
def small_moonlight(monkeypatch):
    monkeypatch.setattr(convert_memory, "MOONLIGHT", TINY)


def test_main_prints_one_document_and_leaves_nothing(small_moonlight, tmp_path, capsys):
    assert convert_memory.main(["--folder", str(tmp_path), "--layers", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written_bytes"] > 0
    assert document["peak_bytes"] > 50e6
    assert list(tmp_path.iterdir()) == []


def test_main_prints_text_by_default(monkeypatch, tmp_path, capsys):
    measured = ConvertMemory(
        read_bytes=32 * 10**9,
        written_bytes=33 * 10**9,
        planned_peak_bytes=4 * 10**8,
        peak_bytes=5 * 10**8,
        seconds=100.0,
    )
    seen = {}
    monkeypatch.setattr(
        convert_memory, "measure_conversion", lambda _, document: seen.update(document) or measured
    )
    assert convert_memory.main(["--folder", str(tmp_path), "--layers", "5"]) == 0
    assert seen == {**MOONLIGHT, "num_hidden_layers": 5}
    assert capsys.readouterr().out == (
        "32.0 GB read, 33.0 GB written in 100.0 s (330 MB/s)\n"
        "peak memory 500 MB, of which tensors at most 400 MB\n"
    )


@pytest.mark.parametrize(
    ("error", "code"), [(VerificationError("no"), 6), (KeyboardInterrupt(), 130)], ids=["6", "130"]
)
def test_main_leaves_nothing_after_a_failure(error, code, monkeypatch, tmp_path):
    def fail(folder, document):
        write_sparse_checkpoint(folder / "source", TINY)
        raise error

    monkeypatch.setattr(convert_memory, "measure_conversion", fail)
    assert convert_memory.main(["--folder", str(tmp_path)]) == code
    assert list(tmp_path.iterdir()) == []


def test_depth_that_cannot_be_converted_is_an_error_of_the_user(small_moonlight, tmp_path, capsys):
    assert convert_memory.main(["--folder", str(tmp_path), "--layers", "1"]) == 3
    assert "no layer to convert" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_measuring_process_stays_small():
    code = "import sys, kimi_convert.bench.convert_memory; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_is_missing_is_one_clear_error(tmp_path, capsys):
    assert convert_memory.main(["--folder", str(tmp_path / "missing")]) == 5
    assert "missing" in capsys.readouterr().err
