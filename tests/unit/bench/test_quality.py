"""The rows of the quality bench, and what becomes of an interrupted one."""

from __future__ import annotations

import pytest

from kimi_convert.bench import quality, quality_rows
from kimi_convert.bench.quality_floor import OFF
from kimi_convert.bench.quality_run import Measured, Setting
from kimi_convert.bench.quality_table import Results
from kimi_convert.config.calibration import AlignRecipe, DistillRecipe, InitMethod
from kimi_convert.config.target_format import TargetFormat

STAGES = quality_rows.stages([AlignRecipe(steps=100)], DistillRecipe(tokens=1_000_000))


def test_every_method_has_a_row_at_the_same_tokens_and_layers():
    rows = dict(quality_rows.starts(STAGES))
    for stage, suffix in zip(
        STAGES, ("", " + 100 steps", " + 100 steps + 1M tokens"), strict=True
    ):
        methods = quality_rows.DISTILLED if stage.distill.tokens else quality_rows.METHODS
        for method in methods:
            recipe = rows[f"{method}{suffix}"]
            assert recipe.calibration is not None
            assert recipe.calibration.method is method
            assert recipe.calibration.align.steps == stage.align.steps
            assert recipe.calibration.distill.tokens == stage.distill.tokens
            assert recipe.kept_layers(8) == (3, 7)
        assert len({rows[f"{method}{suffix}"].calibration.tokens for method in methods}) == 1
    assert {InitMethod.NAIVE, InitMethod.KIL, InitMethod.TAYLOR} < {*quality_rows.DISTILLED}


def test_the_format_that_keeps_rotation_has_a_row_at_every_stage():
    rows = dict(quality_rows.starts(STAGES))
    rotated = [name for name in rows if name.startswith("search, bailing_hybrid")]
    assert len(rotated) == len(STAGES)
    assert {rows[name].output_format for name in rotated} == {TargetFormat.BAILING_HYBRID}


def test_rows_have_names_of_their_own():
    all_stages = quality_rows.stages(
        [AlignRecipe(steps=100), AlignRecipe(steps=300)], DistillRecipe(tokens=20_000_000)
    )
    names = [name for name, _ in quality_rows.starts(all_stages)]
    assert len(names) == len(set(names))


def test_a_distilled_row_knows_the_row_that_it_comes_from():
    jobs = list(
        quality.jobs_of([AlignRecipe(steps=100)], DistillRecipe(tokens=1_000_000), seeds=2)
    )
    names = {job.name for job in jobs}
    distilled = [job for job in jobs if job.undistilled]
    assert {job.name for job in distilled} == {n for n in names if n.endswith("1M tokens")}
    for job in distilled:
        assert job.undistilled == job.name.removesuffix(" + 1M tokens")
        assert job.undistilled in names


def results(path, tmp_path):
    setting = Setting(teacher=tmp_path, calibration=tmp_path, heldout=tmp_path, device="cpu")
    return Results(setting, path)


def run(seed, loss):
    return Measured(seed=seed, loss=loss, kl=loss - 2, top1=0.5, seconds=1.0)


def test_runs_are_kept_by_the_file_and_not_measured_again(tmp_path):
    path = tmp_path / "quality.json"
    first = results(path, tmp_path)
    first.teacher_loss = 2.0
    first.add(OFF, run(0, 6.0))
    first.add("search", run(1, 2.5))
    again = results(path, tmp_path)
    assert again.has("search", 1)
    assert not again.has("search", 0)
    assert list(again.table()) == list(first.table())


def test_r_is_the_share_of_the_loss_that_is_left(tmp_path):
    found = results(None, tmp_path)
    found.teacher_loss = 2.0
    found.add(OFF, run(0, 6.0))
    for seed, loss in enumerate((2.4, 2.4, 2.8)):
        found.add("search", run(seed, loss))
    (line,) = (line for line in found.table() if line.startswith("| search"))
    # Shares of 0.1, 0.1 and 0.2: a deviation of 0.0577; Student's t of 2 degrees is 4.303.
    mean, half = line.split("|")[4].split("±")
    assert float(mean) == pytest.approx(0.4 / 3, abs=1e-3)
    assert float(half) == pytest.approx(4.303 * 0.0577 / 3**0.5, abs=1e-3)
