"""What stands for everything that a fit's results depend on, so that only the same run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from kimi_convert import __version__
from kimi_convert.checkpoints.hashing import sha256_of_file
from kimi_convert.checkpoints.index import open_index
from kimi_convert.config.huggingface import CONFIG_FILE


def fingerprint(folder: Path) -> dict[str, object]:
    """Return what tells a checkpoint folder from another, without reading its weights.

    Raises:
        CheckpointError: it is not a whole checkpoint.
    """
    index = open_index(folder)
    files = {
        name: (file.nbytes, (folder / name).stat().st_mtime_ns)
        for name, file in sorted(index.shards.items())
    }
    return {"config": sha256_of_file(folder / CONFIG_FILE), "files": files}


def digest_of(inputs: Mapping[str, object]) -> str:
    """Return one hash of all inputs, and of this version."""
    document = {"version": __version__, **inputs}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
