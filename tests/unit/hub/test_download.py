"""What a download fetches, where it puts it, and what it does not fetch again."""

from __future__ import annotations

import errno
import json
import logging
import threading

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from kimi_convert.checkpoints.disk import write_all
from kimi_convert.checkpoints.origin import read_origin
from kimi_convert.errors import HubError, InputError, OutputError, ResourceError, UsageError
from kimi_convert.hub import download_checkpoint, fetch_job, transfer
from kimi_convert.hub.transfer import PIECE_BYTES
from tests.hub_server.fixtures import *  # noqa: F403
from tests.hub_server.http import HubServer, running
from tests.tiny import tiny_config, write_tiny_checkpoint

NAME = "tester/tiny"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_config("deepseek_v3"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (folder / "modeling_tiny.py").write_text("raise SystemExit\n", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"onnx")
    return folder


@pytest.fixture
def repository(hub, checkpoint):
    repository = hub.store.create(NAME)
    repository.seed(checkpoint)
    return repository


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


WANTED = {
    "README.md",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
}


@pytest.fixture
def wanted(checkpoint):
    return {name: data for name, data in contents(checkpoint).items() if name in WANTED}


def big_repository(hub, nbytes):
    """One shard of so many bytes that are not all alike; nothing here parses it."""
    data = bytes(range(256)) * (nbytes // 256)
    repository = hub.store.create("tester/big")
    repository.seed({"config.json": b"{}", "model.safetensors": data})
    return data


def test_download_fetches_checkpoint_without_pickle_and_code(hub, repository, tmp_path, wanted):
    result = download_checkpoint(NAME, local_dir=tmp_path / "out")
    assert contents(tmp_path / "out") == wanted
    assert result.commit == repository.head
    assert dict(result.left_out) == {
        "modeling_tiny.py": "code",
        "onnx/model.onnx": "in a folder",
        "pytorch_model.bin": "a pickle, which can run any code",
    }


def test_second_download_fetches_nothing(hub, repository, tmp_path):
    first = download_checkpoint(NAME, local_dir=tmp_path / "out")
    before = hub.sent("resolve")
    again = download_checkpoint(NAME, local_dir=tmp_path / "out")
    assert hub.sent("resolve") == before == first.nbytes
    assert again.fetched_bytes == 0


def test_cache_is_shared_with_huggingface_hub_both_ways(hub, repository, wanted):
    ours = download_checkpoint(NAME)
    assert contents(ours.folder) == wanted
    before = hub.sent("resolve")
    theirs = snapshot_download(NAME, allow_patterns=list(WANTED), endpoint=hub.url)
    assert str(ours.folder) == theirs
    assert hub.sent("resolve") == before
    found = scan_cache_dir(constants.HF_HUB_CACHE)
    assert found.warnings == []
    assert [repo.repo_id for repo in found.repos] == [NAME]


def test_cache_of_huggingface_hub_is_checked_and_used(hub, repository):
    folder = snapshot_download(NAME, allow_patterns=list(WANTED), endpoint=hub.url)
    before = hub.sent("resolve")
    index = (repository.tree()["model.safetensors.index.json"]).size
    result = download_checkpoint(NAME)
    assert str(result.folder) == folder
    assert hub.sent("resolve") == before + index  # read before it is known where files go
    assert {file.was_there for file in result.files} == {True}


def test_damaged_blob_of_another_program_is_fetched_again(hub, repository, wanted, caplog):
    caplog.set_level(logging.WARNING, logger="kimi_convert")
    hub.fault(f"GET .*{SHARD}", flip=4000)
    folder = snapshot_download(NAME, allow_patterns=list(WANTED), endpoint=hub.url)
    result = download_checkpoint(NAME)
    assert contents(result.folder) == wanted
    assert str(result.folder) == folder
    assert "not what the repository lists" in caplog.text


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "commit"])
def test_revision_is_pinned(hub, repository, tmp_path, revision):
    old = repository.head
    repository.tags["v1"] = old
    repository.branches["refs/pr/1"] = old
    repository.seed({"config.json": b'{"model_type": "other"}'})
    revision = old if revision == "commit" else revision
    result = download_checkpoint(f"{NAME}@{revision}", local_dir=tmp_path / "out")
    assert result.commit == old
    assert b"deepseek_v3" in (tmp_path / "out" / "config.json").read_bytes()


def test_new_commit_replaces_what_changed_alone(hub, repository, tmp_path, wanted):
    download_checkpoint(NAME, local_dir=tmp_path / "out")
    repository.seed({"config.json": b'{"model_type": "other"}'})
    download_checkpoint(NAME, local_dir=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == b'{"model_type": "other"}'
    assert hub.sent("safetensors$") == sum(len(wanted[name]) for name in wanted if "-of-" in name)


def test_update_that_breaks_off_leaves_no_mixture_that_loads(hub, repository, tmp_path):
    download_checkpoint(NAME, local_dir=tmp_path / "out")
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    repository.seed({name: repository.read(name)[:-4] + b"new!" for name in shards})
    hub.fault(f"GET .*{shards[1]}", times=9, status=403)
    with pytest.raises(HubError):
        download_checkpoint(NAME, local_dir=tmp_path / "out", max_workers=1)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"config.json", "model.safetensors.index.json"} & left
    hub.faults.clear()
    download_checkpoint(NAME, local_dir=tmp_path / "out")
    assert contents(tmp_path / "out") == {name: repository.read(name) for name in WANTED}


def test_some_files_of_another_commit_leave_the_checkpoint_loadable(hub, repository, tmp_path):
    first = repository.head
    download_checkpoint(NAME, local_dir=tmp_path / "out")
    repository.seed({"README.md": b"new"})
    download_checkpoint(NAME, local_dir=tmp_path / "out", include=["README.md"])
    assert set(contents(tmp_path / "out")) == WANTED
    origin = read_origin(tmp_path / "out")
    assert origin is not None
    assert origin.commit == first


def test_own_file_in_the_way_is_not_replaced(hub, repository, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="in the way"):
        download_checkpoint(NAME, local_dir=tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text("utf-8") == "mine"
    assert not hub.asked("GET .*safetensors$")


def test_include_and_exclude_choose_files(hub, repository, tmp_path):
    result = download_checkpoint(
        NAME, local_dir=tmp_path / "out", include=["onnx/", "*.json"], exclude=["config.json"]
    )
    assert {file.path for file in result.files} == {
        "model.safetensors.index.json",
        "onnx/model.onnx",
    }


def test_dry_run_writes_nothing(hub, repository, tmp_path):
    result = download_checkpoint(NAME, local_dir=tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert {file.path for file in result.files} == WANTED
    assert not any(file.was_there for file in result.files)
    assert not hub.asked(f"GET .*{SHARD}")


def test_too_little_space_ends_before_the_first_byte(hub, repository, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_job, "free_bytes", lambda _: 1000)
    with pytest.raises(ResourceError, match="not enough disk space") as caught:
        download_checkpoint(NAME, local_dir=tmp_path / "out")
    assert "1000 bytes" in caught.value.found
    assert not hub.asked("GET .*safetensors$")
    assert not (tmp_path / "out").exists()


def test_disk_that_fills_up_keeps_the_part(hub, tmp_path, monkeypatch):
    data = big_repository(hub, 4 << 20)
    written = 0

    def write(descriptor, piece):
        nonlocal written
        written += len(piece)
        if written > 2_500_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(descriptor, piece)

    monkeypatch.setattr(transfer, "write_all", write)
    with pytest.raises(ResourceError, match="cannot write") as caught:
        download_checkpoint("tester/big", local_dir=tmp_path / "out")
    assert "No space left" in caught.value.found
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".cache"]
    monkeypatch.undo()
    hub.requests.clear()
    for name, value in hub_environment(hub, tmp_path).items():  # noqa: F405
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    download_checkpoint("tester/big", local_dir=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == data
    assert hub.sent("model.safetensors") == len(data) - 2 * PIECE_BYTES


def test_cut_stream_goes_on_where_it_was_cut(hub, tmp_path):
    data = big_repository(hub, 4 << 20)
    hub.fault("GET .*model.safetensors", times=3, cut=1_000_000)
    download_checkpoint("tester/big", local_dir=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == data
    assert hub.sent("model.safetensors") == len(data)
    asked = [request.range for request in hub.asked("GET .*model.safetensors")]
    assert asked == ["", "bytes=1000000-", "bytes=2000000-", "bytes=3000000-"]


def test_next_run_keeps_whole_pieces(hub, tmp_path):
    data = big_repository(hub, 4 << 20)
    hub.fault("GET .*model.safetensors", cut=2 * PIECE_BYTES + 1000)
    hub.fault("GET .*model.safetensors", times=9, status=403)
    with pytest.raises(HubError):
        download_checkpoint("tester/big", local_dir=tmp_path / "out")
    hub.faults.clear()
    hub.requests.clear()
    download_checkpoint("tester/big", local_dir=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == data
    assert hub.sent("model.safetensors") == len(data) - 2 * PIECE_BYTES


def test_part_that_is_damaged_is_fetched_anew(hub, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="kimi_convert")
    data = big_repository(hub, 3 << 20)
    hub.fault("GET .*model.safetensors", cut=2 * PIECE_BYTES)
    hub.fault("GET .*model.safetensors", times=9, status=403)
    with pytest.raises(HubError):
        download_checkpoint("tester/big", local_dir=tmp_path / "out")
    hub.faults.clear()
    (part,) = (tmp_path / "out").rglob("*.incomplete")
    part.write_bytes(bytes(part.stat().st_size))
    download_checkpoint("tester/big", local_dir=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == data
    assert "came out wrong" in caplog.text


def test_two_downloads_at_once_fetch_each_file_once(hub, repository, tmp_path, wanted):
    failures = []

    def download():
        try:
            download_checkpoint(NAME, local_dir=tmp_path / "out")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=download) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert contents(tmp_path / "out") == wanted
    shard = repository.tree()[SHARD].size
    assert hub.sent(f"GET .*{SHARD}") == shard


def test_redirect_to_another_host_gets_no_token(hub, repository, tmp_path, wanted):
    elsewhere = HubServer(hub.store)
    with running(elsewhere):
        address = elsewhere.url.replace("127.0.0.1", "localhost")
        hub.fault("GET .*safetensors$", times=2, redirect=address)
        download_checkpoint(NAME, local_dir=tmp_path / "out")
    assert contents(tmp_path / "out") == wanted
    assert [request.authorization for request in elsewhere.requests] == ["", ""]
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}  # noqa: F405


def test_list_that_goes_on_at_another_host_is_asked_there_without_the_token(
    hub, repository, tmp_path, wanted
):
    elsewhere = HubServer(hub.store)
    with running(elsewhere):
        elsewhere.faults.lists_go_on_at = hub.url
        hub.faults.list_page = elsewhere.faults.list_page = 2
        hub.faults.lists_go_on_at = elsewhere.url.replace("127.0.0.1", "localhost")
        download_checkpoint(NAME, local_dir=tmp_path / "out")
    assert contents(tmp_path / "out") == wanted
    assert {request.authorization for request in elsewhere.requests} == {""}
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}  # noqa: F405
    assert len(hub.asked("GET .*/tree/")) >= 2  # back at home, with the token


@pytest.mark.parametrize(
    "body",
    [
        b"<p>",
        b'{"error": "no"}',
        b"[7]",
        b'[{"type": "file", "path": "a", "size": -1, "oid": "%s"}]' % (b"0" * 40),
        b'[{"type": "file", "path": "a", "size": 1, "oid": "0"}]',
    ],
)
def test_listing_that_is_none_is_refused(hub, repository, tmp_path, body):
    hub.fault("GET .*/tree/", body=body)
    with pytest.raises(InputError, match="does not make sense"):
        download_checkpoint(NAME, local_dir=tmp_path / "out")


def test_list_without_an_end_is_refused(hub, repository, tmp_path):
    hub.faults.list_page = 0
    with pytest.raises(HubError, match="no end"):
        download_checkpoint(NAME, local_dir=tmp_path / "out")


def test_list_that_goes_on_at_an_unsafe_address_is_refused(hub, repository, tmp_path):
    hub.faults.list_page, hub.faults.lists_go_on_at = 2, "ftp://127.0.0.1"
    with pytest.raises(HubError, match="not safe"):
        download_checkpoint(NAME, local_dir=tmp_path / "out")


def test_rate_limit_is_waited_for(hub, repository, tmp_path, wanted):
    hub.fault("GET ", times=3, status=429, headers={"Retry-After": "0"})
    hub.fault(f"GET .*{SHARD}", times=2, status=503)
    download_checkpoint(NAME, local_dir=tmp_path / "out")
    assert contents(tmp_path / "out") == wanted


@pytest.mark.parametrize("in_cache", [True, False], ids=["cache", "folder"])
def test_offline_takes_what_is_there(hub, repository, tmp_path, monkeypatch, wanted, in_cache):
    place = None if in_cache else tmp_path / "out"
    online = download_checkpoint(NAME, local_dir=place)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    offline = download_checkpoint(NAME, local_dir=place)
    assert (offline.folder, offline.commit) == (online.folder, online.commit)
    assert contents(offline.folder) == wanted
    assert hub.requests == []


@pytest.mark.parametrize("in_cache", [True, False], ids=["cache", "folder"])
def test_offline_says_what_is_not_there(hub, repository, tmp_path, monkeypatch, in_cache):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not here, and HF_HUB_OFFLINE"):
        download_checkpoint(NAME, local_dir=None if in_cache else tmp_path / "out")


def test_progress_counts_bytes_of_all_and_of_each_file(hub, repository, tmp_path):
    events = []
    result = download_checkpoint(NAME, local_dir=tmp_path / "out", on_progress=events.append)
    last = {event.stage: (event.done, event.total) for event in events}
    assert last.pop("downloading") == (result.nbytes, result.nbytes)
    assert last == {file.path: (file.nbytes, file.nbytes) for file in result.files}


def test_result_names_the_hash_of_every_file(hub, repository, tmp_path):
    document = json.loads(json.dumps(download_checkpoint(NAME, local_dir=tmp_path).to_json()))
    sha256 = {file["name"]: file["sha256"] for file in document["files"]}
    assert sha256[SHARD] == repository.tree()[SHARD].sha256
    assert all(sha256.values())


@pytest.mark.parametrize(
    "name", ["tiny", "a/b/c", "../x", "a/..", "a/b@", "a/b@x..y", "a/-b", "a/b@-x", "a b/c"]
)
def test_odd_names_are_refused(hub, name):
    with pytest.raises(UsageError):
        download_checkpoint(name)
    assert hub.requests == []
