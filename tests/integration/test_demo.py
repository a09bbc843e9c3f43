"""`kimi-convert demo`: what a newcomer runs first, with no network and no clone."""

from __future__ import annotations

import json
import shlex

import pytest

from kimi_convert.commands import _demo_steps
from tests.integration.command_line import run_here

pytestmark = pytest.mark.slow

SMALL = """\
[init]
method = "{}"  # the search has a test of its own
[calibration]
tokens = 1024
sequence_length = 64
search_tokens = 256
validation_tokens = 128
"""


@pytest.fixture(scope="module", autouse=True)
def few_tokens():
    """Measure on little text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_demo_steps, "_TOKENS_PER_KIND", 512)
        patch.setattr(_demo_steps, "_NEW_TOKENS", 8)
        patch.setattr(_demo_steps, "RECIPE", SMALL.format("naive"))
        patch.setattr(_demo_steps, "KIL_RECIPE", SMALL.format("kil"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "kimi-convert-demo"


@pytest.fixture(scope="module")
def shown(folder):
    done = run_here("demo", "--output", folder)
    assert done.returncode == 0, done.stderr
    return done


def test_demo_shows_every_command_and_what_was_measured(shown):
    commands = [line for line in shown.stdout.splitlines() if line.startswith("$ kimi-convert")]
    assert [line.split()[2] for line in commands] == [
        "inspect",
        "plan",
        "convert",
        "validate",
        "convert",
        "validate",
        "convert",
        "validate",
        "export",
        "generate",
        "generate",
    ]
    measured = shown.stdout.partition("What was measured")[2]
    words = ("teacher", "this checkpoint", "KIL", "no text", "switched off", "decode", "Files")
    for word in words:
        assert word in measured
    assert "\x1b" not in shown.stdout + shown.stderr


def test_demo_says_what_the_start_is_worth(shown):
    assert "The converted mixers " in shown.stdout
    assert "No gradient was taken" in shown.stdout


def test_demo_shows_a_validate_command_that_gives_its_numbers(shown, folder):
    lines = [line for line in shown.stdout.splitlines() if "kimi-convert validate" in line]
    again = run_here(*shlex.split(lines[0])[2:])
    row = next(line for line in again.stdout.splitlines() if "this checkpoint" in line)
    assert row in shown.stdout


def test_demo_leaves_its_checkpoints(shown, folder):
    for name in ("hybrid", "kil", "copy", "exported"):
        assert run_here("inspect", folder / name, "--quiet").returncode == 0


def test_second_demo_replaces_the_first_and_gives_one_document(shown, folder):
    done = run_here("demo", "--output", folder, "--json")
    assert done.returncode == 0
    assert done.stderr.startswith("replaced the output of an earlier demo in ")
    document = json.loads(done.stdout)
    assert document["validate"]["passed"]
    assert set(document["seconds"]) == {
        "inspect",
        "plan",
        "convert",
        "validate",
        "export safetensors",
        "generate",
    }


def test_demo_keeps_away_from_files_that_it_did_not_make(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = run_here("demo", "--output", tmp_path)
    assert done.returncode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
