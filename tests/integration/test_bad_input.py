"""Bad input end to end: one clear error, the right exit code, nothing in the output folder."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest

from kimi_convert.cli import main
from kimi_convert.conversion import fitted
from tests.integration.broken import (
    BROKEN_SOURCES,
    good_source,
    infinite_expert,
    nan_in_a_mixer,
    nan_weight,
)
from tests.integration.command_line import command, environment

# Values are only looked at where every tensor is read.
SEEN_BY_READING = (nan_weight, nan_in_a_mixer, infinite_expert)


def files_of(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def error_of(capsys, *arguments):
    """Run a command with --json and return the exit code and the error it prints."""
    code = main([*map(str, arguments), "--json", "--quiet"])
    told = capsys.readouterr()
    assert told.err == ""
    return code, json.loads(told.out)["error"]


@pytest.fixture
def source(tmp_path):
    return good_source(tmp_path / "source")


@pytest.mark.parametrize("options", [(), ("--no-text",)], ids=["fitted", "no-text"])
@pytest.mark.parametrize("break_it", BROKEN_SOURCES, ids=lambda function: function.__name__)
def test_broken_source_is_refused_and_leaves_nothing(
    source, tmp_path, capsys, monkeypatch, break_it, options
):
    monkeypatch.setattr(fitted, "calibrate", no_fit)
    break_it(source)
    before = files_of(source)
    output = tmp_path / "made" / "output"
    code, error = error_of(capsys, "convert", source, output, *options)
    assert code == error["exit_code"] == 3
    assert BROKEN_SOURCES[break_it] in f"{error['message']}; {error['found']}"
    assert not output.parent.exists()
    assert files_of(source) == before


def no_fit(*_, **__):
    raise AssertionError("minutes of fitting were begun")


@pytest.mark.parametrize(
    "break_it",
    [case for case in BROKEN_SOURCES if case not in SEEN_BY_READING],
    ids=lambda function: function.__name__,
)
def test_plan_refuses_what_convert_refuses(source, capsys, break_it):
    break_it(source)
    code, error = error_of(capsys, "plan", source)
    assert code == error["exit_code"] == 3


BAD_TEXTS = {
    "broken.jsonl": (b"{", "not valid JSON"),
    "empty.jsonl": (b"", "no documents"),
    "latin-1.txt": (b"price: 5 \xa3", "UTF-8"),
    "text.csv": (b"a,b", ".jsonl"),
    "no-such-file.jsonl": (None, "no such file"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_calibration_text_is_refused_before_a_weight_is_read(
    source, tmp_path, capsys, monkeypatch, name
):
    monkeypatch.setattr(fitted, "check_source_values", no_fit)
    content, said = BAD_TEXTS[name]
    folder = tmp_path / "texts"
    folder.mkdir()
    if content is not None:
        (folder / name).write_bytes(content)
    text = folder / name
    code, error = error_of(capsys, "convert", source, tmp_path / "out", "--calibration", text)
    assert code == 3
    assert str(text) in error["where"]
    assert said in f"{error['message']} {error['expected']} {error['found']}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "texts"]


def test_text_that_is_too_short_says_what_is_needed_and_leaves_nothing(source, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Too short for any recipe.")
    code, error = error_of(capsys, "convert", source, tmp_path / "out", "--calibration", text)
    assert (code, error["type"], error["where"]) == (3, "CalibrationError", str(text))
    assert "131072 tokens" in error["expected"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "model.safetensors"])
def test_output_folder_that_is_not_empty_is_left_as_it_is(source, tmp_path, capsys, name):
    output = tmp_path / "output"
    output.mkdir()
    (output / name).write_text("mine")
    code, error = error_of(capsys, "convert", source, output)
    assert (code, error["type"]) == (3, "OutputError")
    assert files_of(output) == {Path(name): b"mine"}


@pytest.mark.parametrize(
    "relation",
    [
        pytest.param(lambda source: source, id="the-same"),
        pytest.param(lambda source: source / "out", id="inside-the-source"),
        pytest.param(lambda source: source.parent, id="around-the-source"),
        pytest.param(lambda source: source / ".." / source.name, id="the-same-by-another-name"),
    ],
)
def test_output_that_touches_the_source_is_refused(source, capsys, relation):
    before = files_of(source)
    code, error = error_of(capsys, "convert", source, relation(source))
    assert (code, error["type"]) == (3, "OutputError")
    assert files_of(source) == before
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name]


def test_output_that_is_a_link_to_the_source_is_refused(source, tmp_path, capsys):
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    before = files_of(source)
    code, error = error_of(capsys, "convert", source, tmp_path / "link")
    assert (code, error["type"]) == (3, "OutputError")
    assert files_of(source) == before


def test_output_that_is_a_file_is_refused(source, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    code, error = error_of(capsys, "convert", source, tmp_path / "file")
    assert (code, error["type"]) == (3, "OutputError")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_read_only_output_is_a_resource_error(source, tmp_path, capsys):
    shut = tmp_path / "shut"
    shut.mkdir()
    shut.chmod(0o500)
    code, error = error_of(capsys, "convert", source, shut / "output")
    assert (code, error["type"]) == (5, "ResourceError")
    assert list(shut.iterdir()) == []


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux's /sys")
def test_output_on_a_file_system_that_takes_no_files_is_a_resource_error(source, capsys):
    code, error = error_of(capsys, "convert", source, "/sys/kernel/output")
    assert (code, error["type"]) == (5, "ResourceError")


def test_disk_that_takes_no_more_is_a_resource_error_and_leaves_nothing(source, tmp_path):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    output = tmp_path / "output"
    done = subprocess.run(
        command("convert", source, output, "--no-text", "--json", "--quiet"),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=small_disk,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "ResourceError"
    assert "free" in error["found"] or error["hint"]
    assert not output.exists()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("no_such_field = 1\n", id="unknown-field"),
        pytest.param("this is not TOML", id="not-toml"),
    ],
)
def test_bad_recipe_is_refused(source, tmp_path, capsys, text):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    code, error = error_of(capsys, "convert", source, tmp_path / "output", "--recipe", recipe)
    assert (code, error["type"]) == (3, "RecipeError")
    assert not (tmp_path / "output").exists()


def test_missing_recipe_is_refused(source, tmp_path, capsys):
    code, error = error_of(
        capsys, "convert", source, tmp_path / "output", "--recipe", tmp_path / "none.toml"
    )
    assert (code, error["type"]) == (3, "RecipeError")


@pytest.mark.parametrize("size", ["5 parsecs", "0", "-1", "nan"])
@pytest.mark.parametrize("name", ["convert", "plan"])
def test_bad_shard_size_is_a_usage_error(source, tmp_path, capsys, name, size):
    arguments = [source, tmp_path / "output"] if name == "convert" else [source]
    code, error = error_of(capsys, name, *arguments, f"--max-shard-size={size}")
    assert (code, error["type"]) == (2, "UsageError")
    assert not (tmp_path / "output").exists()
