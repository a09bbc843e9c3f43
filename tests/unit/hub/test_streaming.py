"""A source that is fetched file by file gives the same output, and never lies here as a whole."""

from __future__ import annotations

import json

import pytest

from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.conversion.runners import OneByOne
from kimi_convert.hub.reference import Reference
from kimi_convert.hub.streaming import streamed_source
from tests.hub_server.fixtures import *  # noqa: F403
from tests.integration.command_line import run_here
from tests.tiny import tiny_config, write_tiny_checkpoint

NAME = "tester/tiny"
OPTIONS = ["--no-text", "--max-shard-size", "80kB"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    return write_tiny_checkpoint(folder, tiny_config("deepseek_v3"), num_shards=8)


@pytest.fixture
def repository(hub, checkpoint):
    repository = hub.store.create(NAME)
    repository.seed(checkpoint)
    return repository


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stream(output, *more):
    return run_here("convert", NAME, output, *OPTIONS, "--discard-source-shards", *more)


def weights_of(hub):
    return [request for request in hub.asked("safetensors$") if not request.range]


def test_streamed_conversion_is_the_same_byte_for_byte(hub, repository, tmp_path):
    assert run_here("convert", NAME, tmp_path / "whole", *OPTIONS).returncode == 0
    done = stream(tmp_path / "streamed")
    assert done.returncode == 0, done.stderr
    assert f"Converted {NAME}@{repository.head[:12]} to" in done.stdout
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-home", "streamed", "whole"]


def test_no_more_than_the_files_in_use_are_here(hub, repository, checkpoint, tmp_path):
    sizes = [path.stat().st_size for path in checkpoint.glob("*.safetensors")]
    most = 0

    def look(_):
        nonlocal most
        there = (tmp_path / "out.source").rglob("*.safetensors")
        most = max(most, sum(512 * path.stat().st_blocks for path in there))

    reference = Reference(NAME)
    with streamed_source(reference, tmp_path / "out", on_progress=look) as source:
        convert_checkpoint(
            source.folder,
            tmp_path / "out",
            recipe=Recipe(),
            max_shard_bytes=80_000,
            runner=OneByOne(source.weights),
            on_progress=look,
        )
    headers = 8 * 8192  # of each file, in whole blocks
    assert 0 < most - headers <= 3 * max(sizes) < sum(sizes)
    assert len(weights_of(hub)) == len(sizes)


def test_interrupted_streaming_goes_on(hub, repository, tmp_path):
    hub.fault("GET .*00006-of-00008.safetensors", times=1)  # its header
    hub.fault("GET .*00006-of-00008.safetensors", times=9, status=403)
    done = stream(tmp_path / "out")
    assert done.returncode == 4
    assert "--resume" in done.stderr
    assert (tmp_path / "out.source").is_dir()
    hub.faults.clear()
    before = {request.path for request in weights_of(hub)}
    hub.requests.clear()
    done = stream(tmp_path / "out", "--resume")
    assert done.returncode == 0, done.stderr
    # What the first run has read and let go, its finished files have no need of.
    again = {request.path for request in weights_of(hub)} & before
    assert len(again) <= 2
    assert run_here("convert", NAME, tmp_path / "whole", *OPTIONS).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.source").exists()


def test_damaged_file_ends_it_with_the_name(hub, repository, tmp_path):
    hub.fault("GET .*00003-of-00008.safetensors", times=1)  # its header
    hub.fault("GET .*00003-of-00008.safetensors", times=9, flip=20_000)
    done = stream(tmp_path / "out")
    assert done.returncode == 6
    assert "00003-of-00008" in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_provenance_is_that_of_the_repository(hub, repository, tmp_path):
    assert stream(tmp_path / "out").returncode == 0
    source = json.loads((tmp_path / "out" / "conversion.json").read_text("utf-8"))["source"]
    assert (source["repository"], source["commit"]) == (NAME, repository.head)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([NAME, "--discard-source-shards"], id="fit"),
        pytest.param([NAME, "--discard-source-shards", *OPTIONS, "--jobs", "2"], id="jobs"),
    ],
)
def test_what_cannot_be_streamed_is_refused(hub, repository, tmp_path, arguments):
    done = run_here("convert", arguments[0], tmp_path / "out", *arguments[1:])
    assert done.returncode == 2
    assert weights_of(hub) == []
    assert not (tmp_path / "out").exists()


def test_taken_output_leaves_nothing_beside_it(hub, repository, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="ascii")
    assert stream(tmp_path / "out").returncode == 3
    assert weights_of(hub) == []
    assert not (tmp_path / "out.source").exists()


def test_second_process_does_not_touch_the_folder_of_the_first(hub, repository, tmp_path):
    with streamed_source(Reference(NAME), tmp_path / "out", on_progress=lambda _: None) as first:
        first.weights.provide("model-00001-of-00008.safetensors")
        done = stream(tmp_path / "out")
        assert done.returncode == 3
        assert "another process" in done.stderr
        assert (first.folder / "config.json").exists()


def test_own_folder_is_not_discarded(hub, checkpoint, tmp_path):
    done = run_here("convert", checkpoint, tmp_path / "out", *OPTIONS, "--discard-source-shards")
    assert done.returncode == 2
    assert checkpoint.exists()
