"""The example checkpoint as `convert` fits it by default, on little text and with few moves."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.conversion.calibration.moves import MOVES
from kimi_convert.conversion.calibration.search import search_mixer
from tests.integration.command_line import run_here

_RECIPE = """\
[calibration]
tokens = 3072
sequence_length = 128
search_tokens = 1024
validation_tokens = 512
"""
_MOVES = ("basis", "beta", "decay", "value taps")


@dataclass(frozen=True)
class FittedExample:
    """The call of the command line, and the folder that it made."""

    done: subprocess.CompletedProcess[str]
    output: Path


def fit_example(folder: Path) -> FittedExample:
    output = folder / "job" / "hybrid"
    recipe = write_small_recipe(folder)
    with searching_few_moves():
        done = run_here("convert", example_checkpoint(), output, "--recipe", recipe)
    return FittedExample(done, output)


def write_small_recipe(folder: Path) -> Path:
    path = folder / "small.toml"
    path.write_text(_RECIPE)
    return path


@contextmanager
def searching_few_moves() -> Iterator[None]:
    few = tuple(move for move in MOVES if move.name in _MOVES)[: len(_MOVES)]
    with pytest.MonkeyPatch.context() as patch:
        defaults = {**search_mixer.__kwdefaults__, "moves": few}
        patch.setattr(search_mixer, "__kwdefaults__", defaults)
        yield
