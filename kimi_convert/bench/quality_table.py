"""What the quality bench has measured so far: kept in a file, shown as a table."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from kimi_convert.bench.quality_floor import OFF
from kimi_convert.bench.quality_run import Measured, Setting

_STUDENT: Mapping[int, float] = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}


class Results:
    """Runs by row."""

    def __init__(self, setting: Setting, path: Path | None) -> None:
        """Take over what a file has.

        Args:
            setting: what all rows share.
            path: rewritten with every run; None to keep no file.
        """
        self.teacher_loss = math.nan  # nats per token
        self.machine = _machine(setting.device)
        self.rows: dict[str, list[Measured]] = {}
        self._path = path
        self._setting = setting
        if path is not None and path.is_file():
            self._read(json.loads(path.read_text(encoding="utf-8")))

    def has(self, name: str, seed: int) -> bool:
        """Whether a run is there."""
        return any(run.seed == seed for run in self.rows.get(name, ()))

    def add(self, name: str, run: Measured) -> None:
        """Take a run, and write the file."""
        self.rows.setdefault(name, []).append(run)
        self.rows[name].sort(key=lambda one: one.seed)
        if self._path is not None:
            part = self._path.with_name(self._path.name + ".part")
            part.write_text(json.dumps(self._document(), indent=2) + "\n", encoding="utf-8")
            part.replace(self._path)

    def table(self) -> Iterator[str]:
        """Yield the lines of a table."""
        copied = _share([run.teacher_copied for runs in self.rows.values() for run in runs])
        yield (
            f"teacher: loss {self.teacher_loss:.4f} nats per token, copies {copied or '?'}; "
            f"{self.machine}"
        )
        yield ""
        yield "| start | seeds | loss | R | KL | top-1 | copies | KL, calibration text | s |"
        yield "|---|---|---|---|---|---|---|---|---|"
        off = self.rows[OFF][0].loss - self.teacher_loss
        for name, runs in self.rows.items():
            losses = [run.loss for run in runs]
            cells = (
                name,
                str(len(runs)),
                f"{statistics.fmean(losses):.3f}",
                _mean([(loss - self.teacher_loss) / off for loss in losses]),
                _mean([run.kl for run in runs]),
                f"{statistics.fmean(run.top1 for run in runs):.1%}",
                _share([run.copied for run in runs]),
                _mean([run.calibration_kl for run in runs]),
                f"{statistics.fmean(run.seconds for run in runs):.0f}",
            )
            yield f"| {' | '.join(cells)} |"

    def _document(self) -> dict[str, object]:
        return {
            "machine": self.machine,
            "teacher": self._setting.teacher.name,
            "teacher_loss": self.teacher_loss,
            "rows": [
                {"name": name, "runs": [run.to_json() for run in runs]}
                for name, runs in self.rows.items()
            ],
        }

    def _read(self, document: dict[str, object]) -> None:
        self.teacher_loss = float(document["teacher_loss"])  # type: ignore[arg-type]
        for row in document["rows"]:  # type: ignore[attr-defined]
            self.rows[row["name"]] = [Measured(**run) for run in row["runs"]]


def interval(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean, by Student's t; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    t = _STUDENT.get(len(values), 1.96)
    return t * statistics.stdev(values) / math.sqrt(len(values))


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    half = interval(known)
    mean = f"{statistics.fmean(known):.3f}"
    return f"{mean} ± {half:.3f}" if half else mean


def _share(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.1%}" if known else ""


def _machine(device: str) -> str:
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if torch.device(device).type != "cuda":
        return where
    return f"{torch.cuda.get_device_name(device)}, {where}"
