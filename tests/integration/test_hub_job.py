"""The whole job through HTTP: download, convert, validate, publish, and download what was published.

And what a kill in the middle costs: a process of its own is killed while a shard is on its way.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kimi_convert.hub.transfer import PIECE_BYTES
from tests.hub_server import serve
from tests.hub_server.fixtures import *  # noqa: F403
from tests.hub_server.fixtures import TOKEN, USER, hub_environment
from tests.integration.command_line import command, environment, run_cli, run_here

EXAMPLE = Path(__file__).parents[2] / "examples" / "moonlet-7m"
SCRIPT = EXAMPLE.parent / "publish.sh"
SHARD_BYTES = 200_000_000

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def document(*arguments):
    done = run_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


@pytest.mark.slow
def test_whole_job_through_http_gives_the_same_bytes_back(hub, tmp_path):
    hub.store.create("tester/moonlet").seed(EXAMPLE)
    hybrid = tmp_path / "hybrid"
    document("convert", "tester/moonlet", hybrid, "--no-text")
    document("validate", hybrid, "--record")
    published = document("publish", hybrid, "tester/moonlet-kda", "--private", "--tag", "v1")
    again = document("download", "tester/moonlet-kda@v1", "--local-dir", tmp_path / "again")
    assert again["commit"] == published["commit"]
    assert contents(tmp_path / "again") == contents(hybrid)
    report = document("validate", tmp_path / "again")
    assert {"SHA256SUMS", "conversion.json"} <= set(report["integrity"]["hashes_from"])
    card = (tmp_path / "again" / "README.md").read_text("utf-8")
    assert 'base_model: "tester/moonlet"' in card


@pytest.mark.slow
def test_script_converts_publishes_and_compares(hub, tmp_path):
    hub.store.create("tester/moonlet").seed(EXAMPLE)
    extra = {
        **hub_environment(hub, tmp_path),
        "KIMI_CONVERT": f"{sys.executable} -m kimi_convert",
        "WORK": str(tmp_path / "work"),
    }
    arguments = [SCRIPT, "tester/moonlet", "tester/moonlet-kda", "--no-text"]
    done = subprocess.run(
        arguments, cwd=tmp_path, env=environment(**extra), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "byte for byte" in done.stdout
    assert hub.store.repositories["tester/moonlet-kda"].private
    assert contents(tmp_path / "work" / "hybrid") == contents(tmp_path / "work" / "again")


@pytest.fixture
def slow_hub(hub_process, tmp_path):
    """One shard of 200 MB, of which a run gets less than all before it is killed."""
    hub_process.reset()
    block = hashlib.sha256(b"some bytes").digest() * 31_250  # 1 MB that is not a whole piece
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        for _ in range(SHARD_BYTES // len(block)):
            file.write(block)
    hub_process.store.create("tester/big").seed({"config.json": b"{}", "model.safetensors": path})
    yield hub_process
    hub_process.reset()


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_killed_download_goes_on_from_the_last_whole_piece(slow_hub, tmp_path, place):
    hub, cut, killed = slow_hub, 120_000_000, threading.Event()
    hub.fault("GET .*/model.safetensors", cut=cut, hang=killed)
    where = ["--local-dir", tmp_path / "out"] if place == "folder" else []
    extra = environment(**hub_environment(hub, tmp_path))
    arguments = command("download", "tester/big", *where, "--quiet")
    process = subprocess.Popen(arguments, env=extra)
    wait_for(lambda: sum(p.stat().st_size for p in tmp_path.rglob("*.incomplete")) == cut)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed.set()
    hub.requests.clear()

    done = run_cli("download", "tester/big", *where, "--json", **hub_environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    kept = cut // PIECE_BYTES * PIECE_BYTES
    (request,) = hub.asked("GET .*/model.safetensors")
    assert request.range == f"bytes={kept}-"
    assert request.sent == SHARD_BYTES - kept
    folder = Path(json.loads(done.stdout)["folder"])
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == hub.store.repositories["tester/big"].tree()["model.safetensors"].sha256
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.slow
def test_xet_uploads_are_published_and_downloaded(tmp_path):
    """The client's default: contents go to the content-addressed store in chunks."""
    with serve(tmp_path / "hub", with_xet=True) as hub:
        hub.store.users[TOKEN] = USER
        where = {**hub_environment(hub, tmp_path), "HF_HUB_DISABLE_XET": "0"}
        folder = Path(shutil.copytree(EXAMPLE, tmp_path / "moonlet"))
        done = run_cli("publish", folder, "tester/moonlet", "--force", "--json", **where)
        assert done.returncode == 0, done.stderr + done.stdout
        assert hub.asked("POST /_cas/v1/xorbs")
        assert not hub.asked("PUT /_lfs")
        done = run_cli("download", "tester/moonlet", "--local-dir", tmp_path / "again", **where)
        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_two_processes_share_one_download(hub, tmp_path, place):
    hub.store.create("tester/moonlet").seed(EXAMPLE)
    hub.fault("GET .*00001-of-00002", cut=1_000_000)
    where = ["--local-dir", tmp_path / "out"] if place == "folder" else []
    arguments = command("download", "tester/moonlet", *where, "--json", "--quiet")
    extra = environment(**hub_environment(hub, tmp_path))
    both = [
        subprocess.Popen(arguments, env=extra, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    folders = {json.loads(process.communicate(timeout=120)[0])["folder"] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert contents(folders.pop()) == contents(EXAMPLE)
    assert folders == set()
    shards = EXAMPLE.glob("*.safetensors")
    assert hub.sent("safetensors$") == sum(path.stat().st_size for path in shards)


def test_interrupt_ends_with_130_and_keeps_what_came(slow_hub, tmp_path):
    hub, going_on = slow_hub, threading.Event()
    hub.fault("GET .*/model.safetensors", cut=50_000_000, hang=going_on)
    arguments = command("download", "tester/big", "--local-dir", tmp_path / "out")
    extra = environment(**hub_environment(hub, tmp_path))
    process = subprocess.Popen(
        arguments,
        env=extra,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal, also where these tests run in a shell's background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: sum(p.stat().st_size for p in tmp_path.rglob("*.incomplete")) == 50_000_000)
    process.send_signal(signal.SIGINT)
    going_on.set()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".cache"]
