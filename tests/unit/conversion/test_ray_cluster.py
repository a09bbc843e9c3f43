"""Conversions on a local Ray cluster of two nodes: the bytes of a serial run, faults and all.

Ray starts programs of its own and warns of things to come, so it has a process for itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.conversion.ray_cluster import RayCluster
from kimi_convert.errors import CheckpointError, UsageError, VerificationError
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.conversion.test_resume import SHARD_BYTES, digests

# Starts a head and a node, each with one worker. Tells every outcome as one line of JSON.
CLUSTER = """
import json, os, shutil, subprocess, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.conversion.ray_cluster import RayCluster
from kimi_convert.errors import KimiConvertError

source, folder = map(Path, sys.argv[1:])
node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
second = cluster.add_node(**{**node, "include_dashboard": None})

def run(name, **options):
    said = {"name": name}
    try:
        convert_checkpoint(
            source, folder / name, max_shard_bytes=50_000, runner=RayCluster(cluster.address), **options
        )
    except (KimiConvertError, InterruptedError) as error:
        said |= {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(said), flush=True)

def interrupt(event):
    if event.done:
        raise InterruptedError

def lose_a_node(event):
    global second
    if second is not None:
        cluster.remove_node(second, allow_graceful=False)
        second = None

def spoil(event):
    for path in (folder / "spoiled").rglob("model-00002-*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

run("whole")
run("resumed", on_progress=interrupt)
run("resumed", resume=True)
command = (sys.executable, "-m", "kimi_convert", "convert", source, folder / "command", "--no-text",
           "--max-shard-size", "50000", "--engine", "ray", "--json", "--quiet")
done = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": cluster.address},
                      stdout=subprocess.PIPE)
print(json.dumps({"name": "command", "rc": done.returncode}), flush=True)
run("lost", on_progress=lose_a_node)
source = shutil.copytree(source, folder / "broken")
for path in source.glob("*.safetensors"):
    data = path.read_bytes()
    path.write_bytes(data[:-4] + bytes.fromhex("c07fc07f"))
run("damaged")
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray") / "source"
    return write_tiny_checkpoint(folder, tiny_config("deepseek_v3", dtype="bfloat16"))


@pytest.mark.slow
def test_cluster_gives_the_bytes_of_a_serial_run(source, tmp_path):
    convert_checkpoint(source, tmp_path / "serial", max_shard_bytes=SHARD_BYTES)
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, source, tmp_path],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | environment,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr[-3000:]
    whole, cut, resumed, command, lost, damaged = map(json.loads, lines)
    assert whole == {"name": "whole"}
    assert cut["error"] == "InterruptedError"
    assert resumed == {"name": "resumed"}
    assert command == {"name": "command", "rc": 0}
    assert lost == {"name": "lost"}
    for name in ("whole", "resumed", "command", "lost"):
        assert digests(tmp_path / name) == digests(tmp_path / "serial"), name
    assert damaged["error"] == CheckpointError.__name__
    assert "not finite" in damaged["message"]
    assert not (tmp_path / "damaged" / "config.json").exists()


class FakeRay:
    """Runs tasks at once; lets a test change a file in between."""

    def __init__(self, between):
        self.between = between

    def remote(self, function):
        return FakeTask(self, function)

    def wait(self, references, *, num_returns, timeout):
        return references[:1], references[1:]

    def get(self, reference):
        return reference.run()

    def cancel(self, reference, *, force):
        pass

    def shutdown(self):
        pass


class FakeTask:
    def __init__(self, ray, function, *arguments):
        self.ray, self.function, self.arguments = ray, function, arguments

    def options(self, **_):
        return self

    def remote(self, *arguments):
        return FakeTask(self.ray, self.function, *arguments)

    def run(self):
        answer = self.function(*self.arguments)
        if self.function.__name__ == "write_shard":
            self.ray.between(self.arguments[0].path)
        return answer


def test_file_that_reads_differently_afterwards_is_found(source, tmp_path, monkeypatch):
    def spoil(path):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    name = "kimi_convert.conversion.ray_cluster._connected"
    monkeypatch.setattr(name, lambda _: FakeRay(spoil))
    with pytest.raises(VerificationError, match="reads differently") as caught:
        convert_checkpoint(source, tmp_path / "out", runner=RayCluster())
    assert caught.value.exit_code == 6
    assert not (tmp_path / "out").exists()


def test_no_cluster_is_a_usage_error_with_what_to_do(source, tmp_path, monkeypatch):
    class NoCluster:
        def is_initialized(self):
            return False

        def init(self, **_):
            raise ConnectionError("Could not find any running Ray instance.\nMore.")

    name = "kimi_convert.conversion.ray_cluster.import_module"
    monkeypatch.setattr(name, lambda _: NoCluster())
    with pytest.raises(UsageError, match="no Ray cluster") as caught:
        convert_checkpoint(source, tmp_path / "out", runner=RayCluster())
    assert "ray start --head" in caught.value.hint
    assert caught.value.found == "Could not find any running Ray instance."
    assert not (tmp_path / "out").exists()


def test_missing_extra_is_a_usage_error_with_what_to_install(source, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("kimi_convert.conversion.ray_cluster.import_module", missing)
    with pytest.raises(UsageError, match="not installed") as caught:
        convert_checkpoint(source, tmp_path / "out", runner=RayCluster())
    assert "kimi-convert[ray]" in caught.value.hint
