"""Sources by name: looked at from afar, fetched where tensors are needed, folders as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from kimi_convert.hub import download_checkpoint
from kimi_convert.hub.sources import fetch_source, open_headers
from tests.hub_server.fixtures import *  # noqa: F403
from tests.integration.command_line import run_here
from tests.tiny import tiny_config, write_tiny_checkpoint

NAME = "tester/tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # Wide enough that weights dwarf headers.
    config = tiny_config("deepseek_v3", hidden_size=64, vocab_size=4096)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), config)


@pytest.fixture
def repository(hub, checkpoint):
    repository = hub.store.create(NAME)
    repository.seed(checkpoint)
    return repository


def document(*arguments):
    done = run_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_inspect_reads_headers_alone(hub, repository, checkpoint):
    there = document("inspect", NAME)
    here = document("inspect", checkpoint)
    assert there.pop("checkpoint") == f"{NAME}@{repository.head[:12]}"
    here.pop("checkpoint")
    assert there == here
    assert hub.sent("safetensors$") < here["file_bytes"] / 2
    assert all(request.range for request in hub.asked("safetensors$"))


def test_plan_of_a_name_is_that_of_the_folder(hub, repository, checkpoint):
    there, here = document("plan", NAME), document("plan", checkpoint)
    assert there.pop("source") == f"{NAME}@{repository.head[:12]}"
    here.pop("source")
    assert there == here


def test_nothing_of_the_headers_is_left(hub, repository, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with open_headers(NAME) as source:
        assert list(tmp_path.iterdir()) == [source.folder]
        shard = source.folder / "model-00001-of-00002.safetensors"
        assert shard.stat().st_blocks * 512 < shard.stat().st_size
    assert list(tmp_path.iterdir()) == []


def test_long_header_takes_a_second_request(hub, repository, monkeypatch):
    monkeypatch.setattr("kimi_convert.hub.headers._FIRST_BYTES", 100)
    document("inspect", NAME)
    ranges = [request.range for request in hub.asked("00001-of-00002.safetensors$")]
    assert ranges[0] == "bytes=0-99"
    assert ranges[1].startswith("bytes=100-")
    assert len(ranges) == 2


def test_problem_names_the_repository(hub, repository):
    weights = repository.read("model-00002-of-00002.safetensors")
    repository.seed({"model-00002-of-00002.safetensors": weights[:-8]})
    done = run_here("inspect", NAME)
    assert done.returncode == 3
    assert f"{NAME}@{repository.head[:12]}/model-00002-of-00002.safetensors" in done.stdout
    assert "kimi-convert-" not in done.stdout


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_hostile_header_from_afar_is_refused(hub, command):
    huge = (2**40).to_bytes(8, "little") + b"{" + bytes(200)
    hub.store.create(NAME).seed({"config.json": b"{}", "model.safetensors": huge})
    done = run_here(command, NAME)
    assert done.returncode == 3
    assert "not a safetensors file" in done.stderr


def test_convert_and_validate_take_names(hub, repository, tmp_path):
    made = document("convert", NAME, tmp_path / "hybrid", "--no-text")
    assert made["source"].endswith(repository.head)
    before = hub.sent("safetensors$")
    report = document("validate", NAME)
    assert report["passed"]
    assert hub.sent("safetensors$") == before  # from the cache


def test_conversion_records_repository_commit_and_licence(hub, repository, tmp_path):
    repository.seed({"README.md": b"---\nlicense: MIT\ntags: []\n---\n# Tiny\n"})
    document("convert", NAME, tmp_path / "hybrid", "--no-text")
    source = json.loads((tmp_path / "hybrid" / "conversion.json").read_text("utf-8"))["source"]
    assert source["name"] == "tiny"
    assert source["repository"] == NAME
    assert source["commit"] == repository.head
    assert source["license"] == "mit"


def test_dry_run_of_convert_fetches_no_weights(hub, repository, tmp_path):
    document("convert", NAME, tmp_path / "hybrid", "--no-text", "--dry-run")
    assert all(request.range for request in hub.asked("safetensors$"))


def test_offline_inspects_what_was_downloaded(hub, repository, monkeypatch):
    download_checkpoint(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert document("inspect", NAME)["problems"] == []
    assert hub.requests == []


def test_folder_goes_before_a_repository_of_the_same_name(hub, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert fetch_source(NAME) == Path(NAME)
    assert hub.requests == []


def test_name_that_is_nothing_says_that_there_is_no_folder_either(hub, tmp_path):
    done = run_here("convert", "tester/nothing", tmp_path / "out", "--no-text")
    assert done.returncode == 4
    assert "no such repository" in done.stderr
    assert "no" in done.stderr
    assert "none at tester/nothing" in done.stderr
    assert not (tmp_path / "out").exists()


def test_record_needs_a_folder(hub, repository):
    done = run_here("validate", NAME, "--record")
    assert done.returncode == 2
    assert "--record" in done.stderr
