"""Disks in a file that share blocks between files, for tests: mounted where the system lets us."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_IMAGE_BYTES = 512 * 2**20  # a hole; mkfs.xfs wants 300 MB
KINDS = ("btrfs", "xfs")


@contextmanager
def cloning_disk(kind: str, folder: Path) -> Iterator[Path]:
    """Give the folder of a new, empty disk; skip the test where there can be none."""
    make = shutil.which(f"mkfs.{kind}", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if make is None:
        pytest.skip(f"mkfs.{kind} is not installed")
    image, place = folder / f"{kind}.img", folder / kind
    with image.open("xb") as file:
        file.truncate(_IMAGE_BYTES)
    place.mkdir()
    subprocess.run([make, "-q", image], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"{kind} cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
