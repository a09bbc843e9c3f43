"""Facts about the machine and the installation, as data."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import kimi_convert

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "tiktoken",
    "huggingface_hub",
    "transformers",
    "mlx-lm",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "matplotlib",
    "ray",
)


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that kimi-convert can do, and what it takes."""

    name: str
    needs: tuple[str, ...]  # packages
    install: str  # what to give to pip


_FEATURES = (
    Feature(
        "inspect, plan, convert, export safetensors", ("torch", "safetensors"), "kimi-convert"
    ),
    Feature("validate, generate, demo", ("numpy", "tokenizers", "tiktoken"), "kimi-convert"),
    Feature("export onnx", ("onnx", "onnx-ir", "onnxruntime"), "kimi-convert[onnx]"),
    Feature("download, publish, sources by name", ("huggingface_hub", "httpx2"), "kimi-convert"),
    Feature("signatures", ("model-signing", "pyOpenSSL"), "kimi-convert[sign]"),
    Feature(
        "parity with other implementations", ("transformers", "mlx-lm"), "kimi-convert[oracles]"
    ),
    Feature("reports of parity", ("matplotlib",), "kimi-convert[report]"),
)


@dataclass(frozen=True, slots=True)
class PackageState:
    """One package; `version` is None if it is not installed."""

    name: str
    version: str | None


@dataclass(frozen=True, slots=True)
class FeatureState:
    """Whether a feature is available; `get` is the command that makes it so, or empty."""

    name: str
    available: bool
    missing: tuple[str, ...]
    get: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What `doctor` shows."""

    version: str
    python: str
    system: str
    cpu_threads: int
    devices: tuple[str, ...]
    folder: Path
    free_disk_bytes: int | None
    free_memory_bytes: int | None
    packages: tuple[PackageState, ...]
    features: tuple[FeatureState, ...]

    def to_json(self) -> dict[str, object]:
        """Return the document that `doctor --json` prints."""
        return {**asdict(self), "folder": str(self.folder)}


def read_environment() -> Environment:
    """Look at this process, the machine and the current folder."""
    from kimi_convert.checkpoints.disk import free_bytes

    folder = Path.cwd()
    packages = tuple(PackageState(name, _version(name)) for name in _PACKAGES)
    return Environment(
        version=kimi_convert.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        cpu_threads=_cpu_threads(),
        devices=_devices(),
        folder=folder,
        free_disk_bytes=free_bytes(folder),
        free_memory_bytes=free_memory_bytes(),
        packages=packages,
        features=tuple(_state(feature) for feature in _FEATURES),
    )


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that this process may still take, a container's limit included.

    Args:
        root: where `proc` and `sys` are mounted.
    """
    rooms = [
        room
        for room in (_free_of_machine(root), *(_free_of_cgroup(root, files) for files in _CGROUPS))
        if room is not None
    ]
    return min(rooms, default=None)


# Limit and use, for the second and the first version of control groups.
_CGROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _free_of_machine(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields: Mapping[str, str] = dict(line.split(":", 1) for line in lines)
    available = fields.get("MemAvailable")
    return int(available.split()[0]) * 1024 if available else None


def _free_of_cgroup(root: Path, files: tuple[str, str]) -> int | None:
    try:
        limit, used = ((root / file).read_text(encoding="ascii").strip() for file in files)
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdecimal() else None


def _cpu_threads() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> tuple[str, ...]:
    try:
        import torch
    except ImportError:
        return ()
    cuda = tuple(
        f"cuda:{number} {torch.cuda.get_device_name(number)}, "
        f"{torch.cuda.mem_get_info(number)[0] / 1e9:.0f} GB free"
        for number in range(torch.cuda.device_count())
    )
    mps = ("mps",) if torch.backends.mps.is_available() else ()
    return ("cpu", *cuda, *mps)


def _state(feature: Feature) -> FeatureState:
    missing = tuple(name for name in feature.needs if _version(name) is None)
    command = f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(feature.install)}"
    return FeatureState(feature.name, not missing, missing, command if missing else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
