"""What `doctor` reads from the machine."""

from __future__ import annotations

import pytest

from kimi_convert.commands import _environment
from kimi_convert.commands._environment import free_memory_bytes, read_environment

GB = 10**9
MEMINFO = "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:    8000000 kB\n"


def machine(root, **files):
    for path, text in files.items():
        at = root / path.replace("__", "/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text)
    return root


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [
        pytest.param("max", "5", 8_192_000_000, id="no-limit"),
        pytest.param(f"{2 * GB}", f"{GB}", GB, id="limit"),
        pytest.param(f"{GB}", f"{2 * GB}", 0, id="over-the-limit"),
        pytest.param(f"{100 * GB}", "0", 8_192_000_000, id="limit-above-the-machine"),
    ],
)
def test_free_memory_is_the_least_of_machine_and_container(tmp_path, limit, used, free):
    root = machine(
        tmp_path,
        proc__meminfo=MEMINFO,
        **{"sys/fs/cgroup/memory.max": f"{limit}\n", "sys/fs/cgroup/memory.current": f"{used}\n"},
    )
    assert free_memory_bytes(root) == free


def test_free_memory_knows_the_first_version_of_control_groups(tmp_path):
    folder = "sys/fs/cgroup/memory/memory."
    files = {f"{folder}limit_in_bytes": f"{3 * GB}", f"{folder}usage_in_bytes": f"{GB}"}
    assert free_memory_bytes(machine(tmp_path, proc__meminfo=MEMINFO, **files)) == 2 * GB


def test_free_memory_is_unknown_where_the_system_does_not_tell(tmp_path):
    assert free_memory_bytes(tmp_path) is None


def test_missing_package_gives_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(
        _environment,
        "_FEATURES",
        (_environment.Feature("a feature", ("torch", "no-such-package"), "kimi-convert[extra]"),),
    )
    (feature,) = read_environment().features
    assert not feature.available
    assert feature.missing == ("no-such-package",)
    assert feature.get.endswith("-m pip install 'kimi-convert[extra]'")


def test_installed_feature_needs_nothing():
    core = read_environment().features[0]
    assert core.available
    assert core.get == ""


def test_this_machine_has_a_device_disk_and_memory():
    environment = read_environment()
    assert environment.devices[0] == "cpu"
    assert environment.cpu_threads >= 1
    assert environment.free_disk_bytes > 0
    assert environment.free_memory_bytes > 0
    assert environment.to_json()["folder"] == str(environment.folder)
