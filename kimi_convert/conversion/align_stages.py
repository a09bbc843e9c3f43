"""The stages of an alignment: every mixer alone, then all together, on one rank or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_convert.config.calibration import CalibrationRecipe
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ProgressCallback
from kimi_convert.conversion.calibration.calibration_text import CalibrationText, calibration_text
from kimi_convert.conversion.calibration.distill import outcome_before, outcome_from
from kimi_convert.conversion.calibration.distill_pair import (
    DISTILLED,
    distill_pair,
    distilled_name,
)
from kimi_convert.conversion.calibration.outcome import Outcome
from kimi_convert.conversion.calibration.ranks import Ranks
from kimi_convert.conversion.calibration.realign import (
    RealignInput,
    RealignOutcome,
    Targets,
    aligned_name,
    realign,
)
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.model.loading import LayerLoader, open_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignRequest:
    """How a hybrid is aligned."""

    calibration: CalibrationRecipe  # its text, and the steps
    targets: Targets = Targets.SEQUENTIAL
    seed: int = 0
    text: Path | None = None  # `.jsonl` or `.txt`; None for the text that comes with the package


def open_store(folder: Path, digest: str, ranks: Ranks) -> CalibrationStore:
    """Open the store; the first rank makes it."""
    if ranks.is_first:
        store = CalibrationStore(folder, digest)
        ranks.wait()
        return store
    ranks.wait()
    return CalibrationStore(folder, digest)


def last_parameter(store: CalibrationStore, layer_idx: int | None, name: str) -> torch.Tensor:
    """Return a parameter by its name in a layer, or outside, as the last stage left it."""
    if store.has(DISTILLED):
        return store.tensor(distilled_name(layer_idx), name)
    assert layer_idx is not None
    return store.tensor(aligned_name(layer_idx), name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """The whole student before and after, on validation tokens."""

    before: Outcome
    after: Outcome
    distilled: Mapping[str, object] | None


@dataclass(frozen=True, slots=True)
class AlignStages:
    """What is done to one hybrid; every rank makes one."""

    teacher: Path
    student: Path
    text: Path
    request: AlignRequest
    store: CalibrationStore
    device: torch.device
    ranks: Ranks
    on_progress: ProgressCallback

    def reach(self) -> Reached | None:
        """Align, then distil, as far as either is asked for; return what the rank knows of it."""
        calibration, seed = self.request.calibration, self.request.seed
        assert calibration.trains
        config = read_config(self.student)
        rows = calibration_text(self.text, self.student, config, calibration, seed=seed)
        aligned: RealignOutcome | None = None
        note: Mapping[str, object] | None = None
        with (
            torch.no_grad(),
            open_layers(self.teacher, device=self.device) as guide,
            open_layers(self.student, device=self.device) as layers,
        ):
            if calibration.align.steps and self.ranks.is_first:
                aligned = self._align(guide, layers, rows)
            self.ranks.wait()
            if calibration.distill.steps:
                note = distill_pair(
                    guide,
                    layers,
                    rows,
                    calibration.distill,
                    self.store,
                    self.on_progress,
                    ranks=self.ranks,
                    seed=seed,
                )
        if note is not None:
            before = outcome_before(note) if aligned is None else aligned.before
            return Reached(before=before, after=outcome_from(note), distilled=note)
        if aligned is None:
            return None
        return Reached(before=aligned.before, after=aligned.after, distilled=None)

    def _align(
        self, guide: LayerLoader, layers: LayerLoader, rows: CalibrationText
    ) -> RealignOutcome:
        given = RealignInput(
            config=layers.config,
            text=rows,
            recipe=self.request.calibration.align,
            targets=self.request.targets,
            seed=self.request.seed,
        )
        return realign(guide, layers, given, self.store, self.on_progress)
