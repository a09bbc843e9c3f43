"""Compare what hybrids start from, on held-out text: `python -m kimi_convert.bench.quality`.

    [--teacher DIR] [--calibration FILE] [--heldout FILE] [--seeds N] [--align STEPS ...]
    [--only NAME ...] [--json FILE]

Every row takes the same calibration tokens through the same later stages and is written as a bf16
checkpoint before it is measured. R is the share of the loss that switching the released pattern's
converted mixers off costs, and that a hybrid still has:

    R = (loss - loss of the teacher) / (loss switched off - loss of the teacher)
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kimi_convert.bench.quality_floor import FLOORS, FloorTexts, measure_floor
from kimi_convert.checkpoints.examples import calibration_text, example_checkpoint, heldout_text
from kimi_convert.config.calibration import CalibrationRecipe, InitMethod
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.recipe import Recipe, RopeHandling, default_recipe
from kimi_convert.conversion import convert_checkpoint
from kimi_convert.conversion.calibration.calibration_text import calibration_text as read_text
from kimi_convert.errors import KimiConvertError, VerificationError
from kimi_convert.model.loading import open_layers
from kimi_convert.model.text import PackedText, pack_documents, read_documents
from kimi_convert.model.tokenizer import load_tokenizer
from kimi_convert.validation import Check, ValidationOptions, validate_checkpoint

_TOKENS_PER_KIND = 10_240
_LENGTH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One row with one seed."""

    loss: float  # nats per token
    kl: float
    top1: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One start, over seeds."""

    name: str
    runs: tuple[Measured, ...]

    def mean(self, field: str) -> float:
        """Return the mean of a field."""
        return statistics.fmean(getattr(run, field) for run in self.runs)

    def interval(self, field: str) -> float:
        """Return half of the 95 % interval of the mean, by Student's t; 0 for a single run."""
        values = [float(getattr(run, field)) for run in self.runs]
        if len(values) < 2:
            return 0.0
        t = _STUDENT.get(len(values), 1.96)
        return t * statistics.stdev(values) / math.sqrt(len(values))


_STUDENT: Mapping[int, float] = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}


_METHODS = tuple(method for method in InitMethod if method is not InitMethod.COPY)


def starts(align: Sequence[int]) -> Iterator[tuple[str, Recipe]]:
    """Yield every start by name, at equal tokens and, but for the choice of layers, equal stages."""
    yield "copied, no text", Recipe()
    released = replace(default_recipe(), choose_layers=False)
    for steps in (0, *align):
        after = f" + {steps} steps" if steps else ""
        for method in _METHODS:
            yield f"{method}{after}", _with(released, method, steps)
        dropped = replace(released, rope=RopeHandling.DROP)
        yield f"search, rope dropped{after}", _with(dropped, InitMethod.SEARCH, steps)
        yield f"naive, layers chosen{after}", _with(default_recipe(), InitMethod.NAIVE, steps)
        yield f"search, layers chosen{after}", _with(default_recipe(), InitMethod.SEARCH, steps)


def _with(recipe: Recipe, method: InitMethod, steps: int) -> Recipe:
    assert recipe.calibration is not None
    align = replace(recipe.calibration.align, steps=steps)
    return replace(recipe, calibration=replace(recipe.calibration, method=method, align=align))


class Bench:
    """One teacher, its texts, and what its floors are."""

    def __init__(self, teacher: Path, calibration: Path, heldout: Path) -> None:
        """Read the texts."""
        self.teacher, self.calibration, self.heldout = teacher, calibration, heldout
        self.teacher_loss = math.nan  # known once a floor was measured

    def floors(self, wanted: Callable[[str], bool]) -> list[Row]:
        """Measure the floors in the released pattern."""
        config = read_config(self.teacher)
        recipe = CalibrationRecipe()
        fit = read_text(self.calibration, self.teacher, config, recipe, seed=0)
        texts = FloorTexts(fit=fit.inputs[: recipe.search_rows], check=self._packed().tokens)
        kept = Recipe().kept_layers(config.num_layers)
        layers = [n for n in range(config.num_layers) if n not in kept]
        rows: list[Row] = []
        with open_layers(self.teacher) as teacher:
            for name, floor in FLOORS.items():
                if not wanted(name) and name != _OFF:
                    continue
                started = time.monotonic()
                found = measure_floor(teacher, texts, floor=floor, layers=layers)
                run = Measured(
                    loss=found.student_loss,
                    kl=found.kl,
                    top1=found.top1_agreement,
                    seconds=time.monotonic() - started,
                )
                self.teacher_loss = found.teacher_loss
                rows.append(Row(name=name, runs=(run,)))
        return rows

    def measure(self, recipe: Recipe) -> Measured:
        """Convert by a recipe, and measure the checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "hybrid"
            started = time.monotonic()
            convert_checkpoint(self.teacher, output, recipe=recipe, text=self.calibration)
            seconds = time.monotonic() - started
            report = validate_checkpoint(
                output,
                teacher=self.teacher,
                text=self.heldout,
                options=ValidationOptions(
                    checks=frozenset({Check.QUALITY}),
                    sequence_length=_LENGTH,
                    max_tokens_per_kind=_TOKENS_PER_KIND,
                ),
            )
        assert report.quality is not None
        scores = report.quality.student.overall
        if scores.kl is None or scores.top1_agreement is None:
            raise VerificationError("the validation compared nothing", where=output)
        return Measured(
            loss=scores.loss, kl=scores.kl, top1=scores.top1_agreement, seconds=seconds
        )

    def _packed(self) -> PackedText:
        tokenizer = load_tokenizer(self.teacher)
        return pack_documents(
            read_documents(self.heldout),
            tokenizer,
            sequence_length=_LENGTH,
            separator_id=next(iter(tokenizer.eos_token_ids), None),
            max_tokens=32_768,
            max_tokens_per_kind=_TOKENS_PER_KIND,
        )


_OFF = "mixers switched off"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table; exit codes are those of the command line."""
    given = _arguments(arguments)
    try:
        rows, teacher_loss = _run(given)
    except KimiConvertError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    (off,) = [row.mean("loss") for row in rows if row.name == _OFF]
    sys.stdout.write("".join(f"{line}\n" for line in _table(rows, teacher_loss, off)))
    if given.json:
        document = _document(rows, teacher_loss, off)
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _run(given: argparse.Namespace) -> tuple[list[Row], float]:
    bench = Bench(given.teacher, given.calibration, given.heldout)

    def wanted(name: str) -> bool:
        return not given.only or name in given.only

    rows = bench.floors(wanted)
    for name, recipe in starts(given.align):
        if not wanted(name):
            continue
        # A start without text has no seed but that of projections without effect.
        seeds = range(given.seeds if recipe.calibration else 1)
        runs = [bench.measure(replace(recipe, seed=seed)) for seed in seeds]
        rows.append(Row(name=name, runs=tuple(runs)))
        sys.stderr.write(f"{name}: KL {rows[-1].mean('kl'):.3f}\n")
    return rows, bench.teacher_loss


def _table(rows: Sequence[Row], teacher_loss: float, off: float) -> Iterator[str]:
    yield f"teacher: loss {teacher_loss:.4f} nats per token; {_machine()}"
    yield ""
    yield "| start | seeds | loss | R | KL | top-1 | s |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        scale = off - teacher_loss
        cells = (
            row.name,
            str(len(row.runs)),
            f"{row.mean('loss'):.3f}",
            _with_interval(
                (row.mean("loss") - teacher_loss) / scale, row.interval("loss") / scale
            ),
            _with_interval(row.mean("kl"), row.interval("kl")),
            f"{row.mean('top1'):.1%}",
            f"{row.mean('seconds'):.0f}",
        )
        yield f"| {' | '.join(cells)} |"


def _with_interval(mean: float, interval: float) -> str:
    return f"{mean:.3f} ± {interval:.3f}" if interval else f"{mean:.3f}"


def _document(rows: Sequence[Row], teacher_loss: float, off: float) -> dict[str, object]:
    return {
        "machine": _machine(),
        "teacher_loss": teacher_loss,
        "loss_switched_off": off,
        "rows": [
            {
                "name": row.name,
                "runs": [
                    {"loss": run.loss, "kl": run.kl, "top1": run.top1, "seconds": run.seconds}
                    for run in row.runs
                ],
            }
            for row in rows
        ],
    }


def _machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kimi_convert.bench.quality")
    parser.add_argument("--teacher", type=Path, default=example_checkpoint())
    parser.add_argument("--calibration", type=Path, default=calibration_text())
    parser.add_argument("--heldout", type=Path, default=heldout_text())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--align", type=int, nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
