"""Move finished files to where loaders look: all of them, in an order that no loader mistakes.

Weights and other files first, then config.json, and the index last: without it no loader takes the
folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from kimi_convert.checkpoints.disk import disk_errors, sync_folder
from kimi_convert.checkpoints.staging import Staging
from kimi_convert.checkpoints.weight_map import INDEX_FILE
from kimi_convert.config.huggingface import CONFIG_FILE

_LAST = (CONFIG_FILE, INDEX_FILE)


def in_order_of_moving(names: Iterable[str]) -> list[str]:
    """Return the names with those last that make a folder a checkpoint."""
    return sorted(names, key=lambda name: _LAST.index(name) + 1 if name in _LAST else 0)


def move_into_place(staging: Staging, names: Sequence[str]) -> None:
    """Rename files out of the hidden folder, durably; on failure take all of them back.

    Raises:
        ResourceError: one cannot be moved.
    """
    begun: list[str] = []
    try:
        with disk_errors(staging.folder, doing="move the finished files into place"):
            for name in names:
                begun.append(name)
                (staging.path / name).rename(staging.folder / name)
            sync_folder(staging.folder)
            for created in staging.created:
                sync_folder(created.parent)
    except BaseException:
        for name in reversed(begun):
            _take_back(staging.folder / name, staging.path / name)
        raise


def _take_back(place: Path, unfinished: Path) -> None:
    try:
        if os.path.lexists(place):
            place.rename(unfinished)
    except OSError:
        place.unlink(missing_ok=True)
