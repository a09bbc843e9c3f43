"""Where a calibration keeps what it has finished: a folder of one file per layer and stage.

A run that was interrupted finds its layers here and goes on. The folder carries a digest of
everything that the results depend on; one of another run is refused, not overwritten.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kimi_convert.checkpoints.strict_json import as_object
from kimi_convert.errors import OutputError, ResourceError

_STATE_FILE = "calibration.json"
_RECORD = "record"  # the metadata key of a layer's file


class CalibrationStore:
    """Finished layers of one calibration."""

    def __init__(self, folder: Path, digest: str) -> None:
        """Open a folder, or make it.

        Args:
            folder: made if missing; parents too.
            digest: of the inputs.

        Raises:
            OutputError: the folder holds something else, or another calibration.
            ResourceError: it cannot be written.
        """
        self.folder = folder
        state = folder / _STATE_FILE
        try:
            if state.is_file():
                self._check(state, digest)
                return
            if folder.exists() and any(folder.iterdir()):
                raise OutputError(
                    "the folder for a calibration's intermediate results is taken",
                    where=folder,
                    hint="Move it away, or choose another output folder.",
                )
            folder.mkdir(parents=True, exist_ok=True)
            _replace(state, json.dumps({"digest": digest}).encode())
        except OSError as error:
            raise ResourceError(
                "a calibration's intermediate results cannot be written",
                where=folder,
                found=error.strerror,
            ) from error

    def has(self, name: str) -> bool:
        """Whether a part is finished."""
        return self._path(name).is_file()

    def save(
        self, name: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, object]
    ) -> None:
        """Write a part as a whole or not at all.

        Raises:
            ResourceError: the disk is full or cannot be written.
        """
        stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        data = save(stored, metadata={_RECORD: json.dumps(record)})
        try:
            _replace(self._path(name), data)
        except OSError as error:
            raise ResourceError(
                "a calibration's intermediate results cannot be written",
                where=self._path(name),
                found=error.strerror,
                hint="Free space and run the same command again: finished layers are kept.",
            ) from error

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read a part's tensors."""
        with self._open(name) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def tensor(self, name: str, key: str) -> torch.Tensor:
        """Read one tensor of a part."""
        with self._open(name) as file:
            return file.get_tensor(key)

    def record(self, name: str) -> dict[str, object]:
        """Read what was noted about a part."""
        with self._open(name) as file:
            fields = as_object(json.loads((file.metadata() or {}).get(_RECORD, "null")))
        if fields is None:
            raise self._broken(name)
        return dict(fields)

    def remove(self) -> None:
        """Delete everything: the results are in the output."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, name: str):  # noqa: ANN202  (safetensors has no stub for it)
        try:
            return safe_open(self._path(name), framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._broken(name) from error

    def _broken(self, name: str) -> OutputError:
        return OutputError(
            "an intermediate result of a calibration cannot be read",
            where=self._path(name),
            hint=f"Delete {self.folder} and run again.",
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _check(self, state: Path, digest: str) -> None:
        try:
            found = as_object(json.loads(state.read_bytes()))
        except ValueError:
            found = None
        if found is None or found.get("digest") != digest:
            raise OutputError(
                "the intermediate results found here belong to another conversion",
                where=self.folder,
                expected="the same source, recipe, text and version",
                hint="Delete the folder to start anew, or choose another output folder.",
            )


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
