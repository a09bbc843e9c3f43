"""A download through olah, a caching mirror by others: another server than ours, and another client.

olah runs in a process of its own, in front of the test Hub.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from kimi_convert.hub import download_checkpoint
from tests.hub_server.fixtures import *  # noqa: F403
from tests.integration.command_line import run_here

EXAMPLE = Path(__file__).parents[2] / "examples" / "moonlet-7m"
NAME = "tester/moonlet"

pytestmark = pytest.mark.slow


@contextmanager
def mirror_of(hub, folder):
    """Run olah in front of a Hub and give its address."""
    tool = shutil.which("olah-cli", path=Path(sys.executable).parent)
    assert tool, "the extra `oracles` brings olah"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    upstream = hub.url.removeprefix("http://")
    here = f"127.0.0.1:{port}"
    arguments = ["--host", "127.0.0.1", "--port", port, "--hf-scheme", "http"]
    arguments += ["--hf-netloc", upstream, "--hf-lfs-netloc", upstream, "--mirror-scheme", "http"]
    arguments += ["--mirror-netloc", here, "--mirror-lfs-netloc", here]
    arguments += ["--repos-path", folder / "repos", "--log-path", folder / "logs"]
    folder.mkdir()
    log = folder / "olah.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [tool, *map(str, arguments)],
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + 60
        while not answers(port):
            assert process.poll() is None, log.read_text("utf-8", "replace")
            assert time.monotonic() < until
            time.sleep(0.05)
        yield f"http://{here}"
    finally:
        process.terminate()
        process.wait()


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_mirror_serves_headers_downloads_and_its_cache(hub, tmp_path, monkeypatch):
    repository = hub.store.create(NAME)
    repository.seed(EXAMPLE)
    with mirror_of(hub, tmp_path / "mirror") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert run_here("inspect", NAME, "--quiet").returncode == 0
        first = download_checkpoint(NAME, local_dir=tmp_path / "first")
        assert contents(tmp_path / "first") == contents(EXAMPLE)
        assert first.commit == repository.head
        hub.requests.clear()
        download_checkpoint(NAME, local_dir=tmp_path / "second")
        assert contents(tmp_path / "second") == contents(EXAMPLE)
        assert hub.sent("") == 0
