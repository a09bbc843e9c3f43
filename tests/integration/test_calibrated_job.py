"""A conversion that is fitted to text, through the command line, on the example checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest

from kimi_convert.checkpoints.examples import example_checkpoint, heldout_text
from tests.integration.command_line import run_here
from tests.integration.fitted_example import searching_few_moves, write_small_recipe

pytestmark = pytest.mark.slow

MEASURED = ("--text", str(heldout_text()), "--sequence-length", "128", "--max-tokens", "3072")


@pytest.fixture(autouse=True)
def few_moves():
    """A search of four moves: the rest of the table has tests of its own."""
    with searching_few_moves():
        yield


@pytest.fixture
def recipe(tmp_path_factory):
    return write_small_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def converted(fitted_example):
    assert fitted_example.done.returncode == 0, fitted_example.done.stderr
    return fitted_example.done, fitted_example.output


def quality_of(output):
    done = run_here(
        "validate", output, "--teacher", example_checkpoint(), *MEASURED, "--json", "--quiet"
    )
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)["quality"]


def test_cost_is_told_before_and_the_fit_after(converted):
    done, _ = converted
    assert done.stderr.startswith("fitting to 3072 tokens: about ")
    for words in ("that fitted nothing", "as KDA", "released pattern", "KL to the teacher"):
        assert words in done.stdout


def test_fitted_hybrid_is_nearer_to_its_teacher_than_a_copied_one(converted, tmp_path):
    done = run_here("convert", example_checkpoint(), tmp_path / "copy", "--no-text")
    assert done.returncode == 0
    fitted, copied = (quality_of(folder) for folder in (converted[1], tmp_path / "copy"))
    assert fitted["student"]["overall"]["kl"] < copied["student"]["overall"]["kl"] / 2


def test_fit_stands_in_the_provenance(converted):
    document = json.loads((converted[1] / "conversion.json").read_text())
    fit = document["calibration"]
    assert fit["tokens"] == 3072
    assert fit["kept"] == document["layers"]["mla"]
    assert [layer["layer"] for layer in fit["layers"]] == list(range(8))
    assert document["recipe"]["calibration"]["tokens"] == 3072
    assert document["recipe"]["keep_layers"] == fit["kept"]


def test_nothing_is_left_beside_the_output(converted):
    output = converted[1]
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_layers_and_steps_may_be_named(recipe, tmp_path):
    output = tmp_path / "hybrid"
    naive = tmp_path / "naive.toml"
    naive.write_text(f'[init]\nmethod = "naive"\n{recipe.read_text()}')
    options = ("--layers", "2,6", "--align", "2")
    done = run_here("convert", example_checkpoint(), output, "--recipe", naive, *options)
    assert done.returncode == 0, done.stderr
    fit = json.loads((output / "conversion.json").read_text())["calibration"]
    assert fit["kept"] == [2, 6]
    assert all("align_losses" in layer["solved"] for layer in fit["layers"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layers", "some"), "layers.keep"),
        (("--layers", "9"), "layers from 0 to 7"),
        (("--no-text", "--align", "5"), "align.steps"),
        (("--no-text", "--layers", "auto"), "layers.keep"),
        (("--device", "quantum"), "device"),
        (("--calibration", "nowhere.jsonl"), "no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_options_say_what_is_wrong_and_leave_nothing(options, words, recipe, tmp_path):
    output = tmp_path / "hybrid"
    done = run_here("convert", example_checkpoint(), output, "--recipe", recipe, *options)
    assert done.returncode in (2, 3)
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_says_how_much_is_needed(recipe, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("The history of the eye. " * 100)
    done = run_here(
        "convert",
        example_checkpoint(),
        tmp_path / "hybrid",
        "--recipe",
        recipe,
        "--calibration",
        text,
    )
    assert done.returncode == 3
    assert "3072 tokens" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"price: 5 \xa3", "UTF-8"),
        (b"", "holds no documents"),
        (b"One line alone.", "3072 tokens"),
        ("ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ ".encode() * 400, "does not know the words"),
    ],
    ids=["not-utf-8", "empty", "one-line", "unknown-script"],
)
def test_text_that_cannot_be_used_is_exit_3_and_leaves_nothing(content, words, recipe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    output = tmp_path / "hybrid"
    options = ("--recipe", recipe, "--calibration", text)
    done = run_here("convert", example_checkpoint(), output, *options)
    assert done.returncode == 3
    assert words in done.stderr
    assert "text.txt" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_alignment_that_diverges_is_exit_6_with_the_layer(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("kimi_convert.conversion.calibration.align._DIVERGED", 0.0)
    naive = tmp_path / "naive.toml"
    naive.write_text(f'[init]\nmethod = "naive"\n{recipe.read_text()}')
    options = ("--recipe", naive, "--layers", "3,7", "--align", "2")
    done = run_here("convert", example_checkpoint(), tmp_path / "hybrid", *options)
    assert done.returncode == 6
    assert "layer 0" in done.stderr
    assert "finished layers are kept" in done.stderr
    assert not (tmp_path / "hybrid").exists()


def test_work_of_another_conversion_is_not_taken_over(recipe, tmp_path):
    output = tmp_path / "hybrid"
    work = tmp_path / "hybrid.calibration"
    work.mkdir()
    (work / "calibration.json").write_text('{"digest": "another"}')
    done = run_here("convert", example_checkpoint(), output, "--recipe", recipe)
    assert done.returncode == 3
    assert "another conversion" in done.stderr
    assert not output.exists()
    shutil.rmtree(work)


def test_hybrid_that_exists_is_aligned_and_validates(recipe, tmp_path):
    copied, output = tmp_path / "copied", tmp_path / "aligned"
    assert run_here("convert", example_checkpoint(), copied, "--no-text").returncode == 0
    options = ("--recipe", recipe, "--steps", "12", "--quiet", "--json")
    done = run_here("align", example_checkpoint(), copied, output, *options)
    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout)
    assert result["after"]["kl"] < result["before"]["kl"] / 2
    assert [layer["layer"] for layer in result["layers"]] == list(range(8))
    assert run_here("validate", output).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "copied"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--steps", "0"), 2, "--steps"),
        (("--targets", "both"), 2, "--targets"),
        (("--calibration", "nowhere.jsonl"), 3, "no such file"),
        (("--device", "quantum"), 2, "device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_options_of_align_say_what_is_wrong(options, code, words, converted, tmp_path):
    given = (example_checkpoint(), converted[1], tmp_path / "out")
    done = run_here("align", *given, *options)
    assert done.returncode == code
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []
