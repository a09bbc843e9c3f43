"""What can be wrong with a Hub or a repository: one message, the right exit code, nothing loadable.

Each case runs `download` as a user does; no output may hold the token, however it is asked for.
"""

from __future__ import annotations

import json

import pytest

from kimi_convert.errors import CheckpointError, HubError, InputError, ResourceError, UsageError
from kimi_convert.errors import VerificationError as WrongError
from tests.hub_server.fixtures import *  # noqa: F403
from tests.integration.command_line import run_here

NAME = "tester/model"
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
DATA = bytes(range(256)) * 64


def index_of(shard):
    return json.dumps({"metadata": {}, "weight_map": {"w": shard}}).encode()


def sound(hub, **extra):
    repository = hub.store.create(NAME)
    repository.seed({"config.json": b"{}", INDEX: index_of(SHARD), SHARD: DATA, **extra})
    return repository


def private(hub):
    sound(hub).private = True
    hub.store.users.pop(TOKEN)  # noqa: F405  (what an expired token looks like)


def with_fault(pattern, **fault):
    def prepare(hub):
        sound(hub)
        hub.fault(pattern, times=99, **fault)

    return prepare


def with_shard_named(name):
    def prepare(hub):
        repository = hub.store.create(NAME)
        repository.seed({"config.json": b"{}", INDEX: index_of(name), SHARD: DATA})

    return prepare


def in_circles(hub):
    sound(hub)
    hub.fault(SHARDS, times=99, redirect=hub.url)


def with_entry(size, oid, sha256):
    def prepare(hub):
        repository = sound(hub)
        entry = repository.tree()[SHARD]
        repository.tree()[SHARD] = type(entry)(size, oid, sha256)

    return prepare


def without_ranges(hub):
    sound(hub)
    hub.fault(SHARDS, cut=5000)
    hub.fault(SHARDS, times=99, whole=True)


def too_large(hub):
    repository = sound(hub)
    entry = repository.tree()[INDEX]
    repository.tree()[INDEX] = type(entry)(2 * 10**9, entry.oid)


def gated(hub):
    sound(hub).gated = True


def nothing(hub):
    """Make no repository."""


def without_shard(hub):
    hub.store.create(NAME).seed({"config.json": b"{}", INDEX: index_of(SHARD)})


def pickles(hub):
    hub.store.create(NAME).seed({"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."})


def empty(hub):
    hub.store.create(NAME)


def shorter_in_listing(hub):
    repository = sound(hub)
    entry = repository.tree()[SHARD]
    repository.tree()[SHARD] = type(entry)(len(DATA) - 9, entry.oid, entry.sha256)


def odd_path(path):
    def prepare(hub):
        sound(hub, **{path: b"evil"})

    return prepare


def echo(hub):
    """A server that answers with the token it was given."""
    sound(hub)
    headers = {"X-Error-Message": f"bad token Bearer {TOKEN} or {TOKEN}"}  # noqa: F405
    hub.fault("GET /api", times=99, status=403, headers=headers)


FILES = "GET .*/resolve/"
SHARDS = f"GET .*/resolve/.*{SHARD}"
REVISION = "GET /api/models/.*/revision"

CASES = [
    pytest.param(private, HubError, "does not accept the token", id="expired-token"),
    pytest.param(gated, HubError, "is gated", id="gated"),
    pytest.param(nothing, HubError, "no such repository", id="no-repository"),
    pytest.param(with_fault(REVISION, status=403), HubError, "does not give the right", id="403"),
    pytest.param(
        with_fault(SHARDS, status=404, headers={"X-Error-Code": "EntryNotFound"}),
        HubError,
        "no such file",
        id="file-gone",
    ),
    pytest.param(with_fault(REVISION, status=412), HubError, "has changed since", id="412"),
    pytest.param(with_fault(REVISION, status=429), HubError, "fewer requests", id="429"),
    pytest.param(
        with_fault(SHARDS, status=429, headers={"Retry-After": "86400"}),
        HubError,
        "fewer requests",
        id="429-for-a-day",
    ),
    pytest.param(with_fault(REVISION, status=500), HubError, "has a problem", id="500"),
    pytest.param(with_fault(SHARDS, status=503), HubError, "has a problem", id="503-on-a-file"),
    pytest.param(with_fault(SHARDS, cut=0), HubError, "breaks off", id="cut-at-once"),
    pytest.param(with_fault(SHARDS, flip=99), WrongError, "its hash differs", id="corrupt-byte"),
    pytest.param(
        with_fault(f"{FILES}.*config.json", flip=1), WrongError, "its hash differs", id="config"
    ),
    pytest.param(shorter_in_listing, WrongError, "another size", id="wrong-size"),
    pytest.param(
        with_fault(SHARDS, body=b"<!doctype html><p>Log in"), HubError, "web page", id="html"
    ),
    pytest.param(
        with_fault(FILES, redirect="http://127.0.0.1:9"), HubError, "cannot be reached", id="away"
    ),
    pytest.param(in_circles, HubError, "one address to the next", id="redirects-in-circles"),
    pytest.param(without_ranges, HubError, "does not send parts", id="no-ranges"),
    pytest.param(too_large, CheckpointError, "larger than", id="index-of-2-GB"),
    pytest.param(with_entry(-1, "0" * 40, None), InputError, "make sense", id="negative-size"),
    pytest.param(with_entry(9, "../x", None), InputError, "make sense", id="hash-is-a-path"),
    pytest.param(with_entry(9, "0" * 40, "../x"), InputError, "make sense", id="sha256-is-a-path"),
    pytest.param(without_shard, CheckpointError, "not in the repository", id="no-shard"),
    pytest.param(pickles, CheckpointError, "pickle", id="pickle-only"),
    pytest.param(empty, CheckpointError, "holds no checkpoint", id="empty"),
    pytest.param(echo, HubError, "does not give the right", id="server-repeats-the-token"),
    *[
        pytest.param(with_shard_named(name), CheckpointError, "not a plain file", id=f"index-{id}")
        for id, name in {
            "upward": f"../../../../tester/secret/resolve/main/{SHARD}",
            "absolute": f"/etc/{SHARD}",
            "escaped": f"%2e%2e%2f{SHARD}",
            "backslash": f"..\\{SHARD}",
            "drive": f"C:{SHARD}",
            "query": f"{SHARD}?x=.safetensors",
            "number": 7,
            "list": [SHARD],
            "none": None,
        }.items()
    ],
]


def left_of(folder):
    """What a loader would see."""
    if not folder.exists():
        return []
    return [path.name for path in folder.iterdir() if path.name != ".cache"]


@pytest.mark.parametrize(("prepare", "kind", "message"), CASES)
def test_bad_input_is_one_error_and_leaves_nothing_that_loads(
    hub, tmp_path, prepare, kind, message
):
    users = dict(hub.store.users)
    prepare(hub)
    out = tmp_path / "out"
    try:
        done = run_here("download", NAME, "--local-dir", out, "--verbose", "--json")
    finally:
        hub.store.users.update(users)
    error = json.loads(done.stdout)["error"]
    assert message in error["message"]
    assert done.returncode == error["exit_code"] == kind.exit_code
    assert error["where"]
    assert error["hint"]
    assert "config.json" not in left_of(out)
    assert INDEX not in left_of(out)
    assert TOKEN not in done.stdout + done.stderr  # noqa: F405
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "path",
    ["../evil", "/evil", "a/../../evil", "..\\evil", "C:/evil", ".cache/huggingface/x", ".git/x"],
)
def test_odd_path_is_refused_where_it_is_wanted(hub, tmp_path, path):
    odd_path(path)(hub)
    out = tmp_path / "deep" / "out"
    done = run_here("download", NAME, "--local-dir", out, "--include", "*")
    assert done.returncode == InputError.exit_code
    assert "name is not safe" in done.stderr
    assert "--exclude" in done.stderr
    assert not list(tmp_path.rglob("*evil*"))


def test_odd_path_that_is_not_wanted_does_no_harm(hub, tmp_path):
    odd_path("../evil")(hub)
    assert run_here("download", NAME, "--local-dir", tmp_path / "out").returncode == 0
    assert not list(tmp_path.rglob("*evil*"))


def test_index_with_foreign_name_asks_for_no_other_repository(hub, tmp_path):
    hub.store.create("tester/secret", private=True).seed({SHARD: DATA})
    with_shard_named(f"../../../../tester/secret/resolve/main/{SHARD}")(hub)
    run_here("download", NAME, "--local-dir", tmp_path / "out")
    assert not hub.asked("secret")


@pytest.mark.parametrize("form", ["--json", "--quiet"])
def test_traceback_of_a_bug_holds_no_token(hub, tmp_path, monkeypatch, form):
    def broken(*_, **__):
        raise RuntimeError(f"sent Authorization: Bearer {TOKEN} and {TOKEN}")  # noqa: F405

    monkeypatch.setattr("kimi_convert.hub.download.connect", broken)
    done = run_here("download", NAME, "--local-dir", tmp_path / "out", "--verbose", form)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert TOKEN not in done.stdout + done.stderr  # noqa: F405


def test_unknown_revision_says_where_to_look(hub, tmp_path):
    sound(hub)
    done = run_here("download", f"{NAME}@v9", "--local-dir", tmp_path / "out")
    assert done.returncode == HubError.exit_code
    assert "no such revision" in done.stderr


def test_corrupt_shard_is_named(hub, tmp_path):
    with_fault(SHARDS, flip=99)(hub)
    done = run_here("download", NAME, "--local-dir", tmp_path / "out")
    assert done.returncode == WrongError.exit_code
    assert SHARD in done.stderr


def test_private_repository_without_token_asks_for_a_login(hub, tmp_path, monkeypatch):
    sound(hub).private = True
    monkeypatch.delenv("HF_TOKEN")
    done = run_here("download", NAME, "--local-dir", tmp_path / "out")
    assert done.returncode == HubError.exit_code
    assert "hf auth login" in done.stderr


def test_no_server_at_all_is_said_once(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = run_here("download", NAME, "--local-dir", tmp_path / "out")
    assert done.returncode == HubError.exit_code
    assert "cannot be reached" in done.stderr


@pytest.mark.parametrize("endpoint", ["ftp://x", "nonsense", f"http://user:{TOKEN}@x"])  # noqa: F405
def test_endpoint_that_is_no_address_is_refused(hub, tmp_path, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    done = run_here("download", NAME, "--local-dir", tmp_path / "out", "--json")
    assert done.returncode == HubError.exit_code
    assert TOKEN not in done.stdout + done.stderr  # noqa: F405


def test_folder_that_cannot_be_written_is_a_resource_error(hub, tmp_path):
    sound(hub)
    (tmp_path / "file").write_text("", encoding="ascii")
    done = run_here("download", NAME, "--local-dir", tmp_path / "file" / "out")
    assert done.returncode == ResourceError.exit_code
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["a/b/c"], ["tester/model@x", "--revision", "y"], ["tester/model", "--max-workers", "0"], []],
)
def test_wrong_usage_is_exit_2(hub, arguments):
    assert run_here("download", *arguments).returncode == UsageError.exit_code
