"""What surrounds a fit: checks before it, its folder beside the output, and what a failure leaves.

Whole fits are tested in `calibration/test_run.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_convert.conversion import fitted
from kimi_convert.conversion.fitted import convert_checkpoint, work_folder
from kimi_convert.conversion.ray_cluster import RayCluster
from kimi_convert.errors import CalibrationError, OutputError, ResourceError, UsageError
from tests.integration.broken import good_source


@pytest.fixture
def source(tmp_path):
    return good_source(tmp_path / "source")


@pytest.mark.parametrize(
    ("output", "work"),
    [
        ("hybrid", "hybrid.calibration"),
        ("a/hybrid", "a/hybrid.calibration"),
        ("a/v1.5/", "a/v1.5.calibration"),
    ],
)
def test_work_folder_lies_beside_the_output(output, work):
    assert work_folder(Path(output)) == Path(work)


@pytest.mark.parametrize("name", [".", "inner/.."])
def test_work_folder_of_a_path_without_a_name_lies_beside_the_real_one(
    name, tmp_path, monkeypatch
):
    folder = tmp_path / "here"
    (folder / "inner").mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert work_folder(Path(name)) == tmp_path / "here.calibration"


def failing_fit(monkeypatch, error):
    """Let the fit fail after it has finished a layer."""

    def calibrate(source, work, **_):
        work.mkdir(parents=True, exist_ok=True)
        (work / "layer").write_text("finished")
        raise error

    monkeypatch.setattr(fitted, "calibrate", calibrate)


def test_cluster_that_is_not_there_is_missed_before_the_fit(source, tmp_path, monkeypatch):
    def refuse(address):
        raise UsageError("there is no Ray cluster to run on")

    failing_fit(monkeypatch, AssertionError("the fit was begun"))
    monkeypatch.setattr("kimi_convert.conversion.ray_cluster._connected", refuse)
    with pytest.raises(UsageError):
        convert_checkpoint(source, tmp_path / "out", runner=RayCluster())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_fit_that_its_input_rules_out_leaves_nothing(source, tmp_path, monkeypatch):
    failing_fit(monkeypatch, CalibrationError("too little text"))
    with pytest.raises(CalibrationError):
        convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "error", [ResourceError("disk full"), KeyboardInterrupt()], ids=["full-disk", "interrupt"]
)
def test_fit_that_can_go_on_keeps_what_is_finished(source, tmp_path, monkeypatch, error):
    failing_fit(monkeypatch, error)
    with pytest.raises(type(error)):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.calibration" / "layer").read_text() == "finished"


def test_folder_that_was_there_before_is_never_removed(source, tmp_path, monkeypatch):
    failing_fit(monkeypatch, OutputError("belongs to another conversion"))
    (tmp_path / "out.calibration").mkdir()
    (tmp_path / "out.calibration" / "mine").write_text("mine")
    with pytest.raises(OutputError):
        convert_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out.calibration" / "mine").read_text() == "mine"
