"""Fit a conversion to text: study the teacher, choose the layers that stay, solve in order.

Memory holds one layer of the teacher and its student, and the activations of the calibration
tokens; what is finished lies in a folder beside the output, from which an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kimi_convert.checkpoints.examples import calibration_text as bundled_text
from kimi_convert.checkpoints.hashing import sha256_of_file
from kimi_convert.config.calibration import CalibrationRecipe
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.config.recipe import Recipe, RopeHandling
from kimi_convert.conversion.calibration.calibration_text import CalibrationText, calibration_text
from kimi_convert.conversion.calibration.choice import (
    LayerChoice,
    candidate_sets,
    choose_layers,
    longest_run,
)
from kimi_convert.conversion.calibration.distill import DistillInput, distill, outcome_from
from kimi_convert.conversion.calibration.distill_pair import (
    DISTILLED,
    distilled_name,
    save_distilled,
)
from kimi_convert.conversion.calibration.ends import Ends, trained_ends
from kimi_convert.conversion.calibration.fingerprint import digest_of, fingerprint
from kimi_convert.conversion.calibration.hybrid import Hybrid, HybridLayer
from kimi_convert.conversion.calibration.long_context import LongContext, compare_at_length
from kimi_convert.conversion.calibration.probing import probe_hybrid
from kimi_convert.conversion.calibration.report import (
    CalibrationReport,
    KeptSet,
    LayerFit,
    layer_fit,
)
from kimi_convert.conversion.calibration.rest import FROZEN, rest_dtypes, rest_of
from kimi_convert.conversion.calibration.sequential import (
    SequentialInput,
    SolvedStudent,
    fitted_name,
    fitted_student,
    solve_in_order,
)
from kimi_convert.conversion.calibration.starts import start_of
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.calibration.study import Study, StudyInput, part_name, study_layers
from kimi_convert.conversion.target import target_config
from kimi_convert.model.backend import usable_device
from kimi_convert.model.loading import LayerLoader, open_layers
from kimi_convert.model.recall import ProbeResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A finished fit: the recipe with its layers settled, and where the parameters lie."""

    recipe: Recipe  # names the layers that stay
    store: CalibrationStore
    report: CalibrationReport

    def parameter(self, layer_idx: int | None, name: str) -> torch.Tensor:
        """Return one fitted parameter, fp32, by its name in the layer, "kda.q.weight", or outside."""
        return self.store.tensor(_latest(self.store, layer_idx), name)


@torch.no_grad()
def calibrate(
    source: str | Path,
    work_folder: str | Path,
    *,
    recipe: Recipe,
    text: str | Path | None = None,
    device: torch.device | str = "cpu",
    on_progress: ProgressCallback = ignore_progress,
) -> Calibration:
    """Fit every layer of a conversion.

    Args:
        source: folder of the teacher.
        work_folder: for finished layers; a run that finds its own there goes on with them.
        recipe: with a calibration.
        text: `.jsonl` or `.txt`; None for the text that comes with the package.
        device: where models run.
        on_progress: told of every stage.

    Raises:
        ConfigError: the source cannot become a hybrid.
        CheckpointError: the source is not whole.
        InputError: the text cannot be used; CalibrationError where there is too little of it.
        OutputError: the work folder is another run's.
        ResourceError: the disk is full.
        VerificationError: alignment diverges.
    """
    assert recipe.calibration is not None
    source, device = Path(source), usable_device(device)
    path = bundled_text() if text is None else Path(text)
    config = read_config(source)
    target_config(config, recipe)  # refuses what cannot be converted before any work
    rows = calibration_text(path, source, config, recipe.calibration, seed=recipe.seed)
    store = CalibrationStore(Path(work_folder), _digest(source, path, recipe))
    with open_layers(source, device=device) as teacher:
        run = _Run(teacher, recipe, recipe.calibration, rows, store, on_progress)
        study, choice, long = run.study()
        settled = replace(recipe, keep_layers=choice.kept, choose_layers=False)
        solved = run.solve(settled)
        distilled = run.distill(settled)
        probes = run.probe(settled)
    report = CalibrationReport(
        text_name=path.name,
        text_sha256=sha256_of_file(path),
        tokens=rows.inputs.numel(),
        sequence_length=rows.inputs.shape[1],
        kept=choice.kept,
        compared=tuple(
            KeptSet(
                kept=kept,
                kl=kl,
                chance=choice.chance_of[kept],
                longest_run=longest_run(kept, config.num_layers),
            )
            for kept, kl in choice.kl_of.items()
        ),
        layers=tuple(_layer_fit(n, study, solved, store) for n in range(config.num_layers)),
        validation=solved.outcome if distilled is None else outcome_from(distilled),
        long_context=long,
        distilled=distilled,
        probes=probes,
    )
    return Calibration(recipe=settled, store=store, report=report)


@dataclass(frozen=True, slots=True)
class _Run:
    """The two passes over one teacher."""

    teacher: LayerLoader
    recipe: Recipe
    calibration: CalibrationRecipe
    text: CalibrationText
    store: CalibrationStore
    on_progress: ProgressCallback

    def study(self) -> tuple[Study, LayerChoice, LongContext | None]:
        """Measure every layer, and settle which of them stay."""
        config = self.teacher.config
        tokens = self.text.inputs
        released = replace(self.recipe, choose_layers=False).kept_layers(config.num_layers)
        given = StudyInput(
            config=target_config(config, replace(self.recipe, choose_layers=False)),
            search_tokens=tokens[: self.calibration.search_rows],
            validation_tokens=tokens[len(tokens) - self.text.validation_rows :],
            fold=self.recipe.rope is RopeHandling.FOLD,
        )
        start = start_of(self.calibration.method, seed=self.recipe.seed)
        study = study_layers(self.teacher, given, start, self.store, self.on_progress)
        sets = candidate_sets(study, released) if self.recipe.choose_layers else [released]
        choice = choose_layers(self.teacher, given, study, sets, self.store, self.on_progress)
        if choice.kept == released:
            return study, choice, None
        long = compare_at_length(
            self.teacher,
            given,
            (released, choice.kept),
            self.text.long,
            self.store,
            self.on_progress,
        )
        if long is not None and long.kl_of[released] < long.kl_of[choice.kept]:
            choice = replace(choice, kept=released)
        return study, choice, long

    def solve(self, settled: Recipe) -> SolvedStudent:
        """Solve the layers of the settled hybrid in order."""
        return solve_in_order(
            self.teacher, self._sequential(settled), self.store, self.on_progress
        )

    def distill(self, settled: Recipe) -> Mapping[str, object] | None:
        """Train all mixers or all parameters together, if the recipe says so; return what to note."""
        recipe = self.calibration.distill
        if not recipe.steps:
            return None
        if not self.store.has(DISTILLED):
            hybrid, given = self._hybrid(settled), self._sequential(settled)
            check = given.text.tokens[len(given.text.tokens) - given.text.validation_rows :]
            note = distill(
                hybrid,
                DistillInput(
                    tokens=given.text.training,
                    check=check,
                    teacher=self.teacher.config,
                    recipe=recipe,
                    seed=settled.seed,
                ),
                self.store,
                self.on_progress,
            )
            save_distilled(hybrid, self.store, note)
        return self.store.record(DISTILLED)

    def probe(self, settled: Recipe) -> Sequence[ProbeResult]:
        """Ask teacher and hybrid what only their context can tell."""
        names: dict[int | None, str] = {
            n: _latest(self.store, n) for n in range(self.teacher.config.num_layers)
        }
        if self.calibration.distill.trains_all:
            names[None] = distilled_name(None)
        given = self._sequential(settled)
        return probe_hybrid(self.teacher, given, names, self.store, self.on_progress)

    def _hybrid(self, settled: Recipe) -> Hybrid:
        """Put the solved student together, around one copy of the teacher where that is frozen."""
        given, teacher = self._sequential(settled), self.teacher
        trains_all = self.calibration.distill.trains_all

        def layers() -> Iterator[HybridLayer]:
            for n in range(teacher.config.num_layers):
                layer, rest, dtypes = teacher.layer(n), None, FROZEN
                if trains_all:
                    rest = rest_of(teacher, n)
                    dtypes = rest_dtypes(teacher, rest, n)
                student, matrix = fitted_student(
                    layer, n, self.store.tensors(fitted_name(n)), given
                )
                yield HybridLayer(layer, student, matrix, rest=rest, dtypes=dtypes)

        ends = Ends(teacher.embedding(), teacher.head())
        return Hybrid(ends, layers(), own=trained_ends(teacher) if trains_all else None)

    def _sequential(self, settled: Recipe) -> SequentialInput:
        return SequentialInput(
            config=target_config(self.teacher.config, settled),
            text=self.text,
            fold=settled.rope is RopeHandling.FOLD,
            align=self.calibration.align,
            seed=settled.seed,
        )


def _latest(store: CalibrationStore, layer_idx: int | None) -> str:
    """Return the store's name of a layer's last parameters, or of what is outside of layers."""
    if store.has(DISTILLED):
        return distilled_name(layer_idx)
    assert layer_idx is not None
    return fitted_name(layer_idx)


def _layer_fit(
    layer_idx: int, study: Study, solved: SolvedStudent, store: CalibrationStore
) -> LayerFit:
    return layer_fit(
        layer_idx,
        kl_as_kda=study.kl_as_kda[layer_idx],
        kl_as_mla=study.kl_as_mla[layer_idx],
        router_agreement=solved.router_agreement[layer_idx],
        search=store.record(part_name(layer_idx)),
        solved=store.record(fitted_name(layer_idx)),
    )


def _digest(source: Path, text: Path, recipe: Recipe) -> str:
    return digest_of(
        {
            "source": fingerprint(source),
            "recipe": recipe.to_json(),
            "text": sha256_of_file(text),
        }
    )
