"""Whole calibrations of small random models: resumed, refused, stored, judged."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import replace

import pytest
import torch

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.commands._fit import fit_report
from kimi_convert.commands._report import Sentence, Table
from kimi_convert.config.calibration import (
    AlignRecipe,
    CalibrationRecipe,
    DistilledParameters,
    DistillRecipe,
    InitMethod,
)
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.recipe import Recipe, RopeHandling
from kimi_convert.config.target_format import TargetFormat
from kimi_convert.conversion.calibration import (
    ahead,
    align,
    choice,
    distill,
    hybrid,
    moves,
    outputs,
    run,
    search,
)
from kimi_convert.conversion.calibration.calibration_text import calibration_text
from kimi_convert.conversion.calibration.long_context import LongContext
from kimi_convert.conversion.fitted import WORK_SUFFIX, convert_checkpoint
from kimi_convert.errors import CalibrationError, OutputError, VerificationError
from kimi_convert.model.loading import load_model
from kimi_convert.model.recall import probes_of
from kimi_convert.validation import Check, ValidationOptions, validate_checkpoint
from tests.pretend_device import pretended_device
from tests.quantized import write_twins
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.validation.build import edit_tensors

LENGTH = 24
FITTED = {
    "tokens": 30 * LENGTH,
    "sequence_length": LENGTH,
    "search_tokens": 8 * LENGTH,
    "validation_tokens": 4 * LENGTH,
}


@pytest.fixture(autouse=True)
def two_moves(monkeypatch):
    """The search of every layer is tested apart."""
    kept = tuple(move for move in moves.MOVES if move.name in ("decay", "beta"))[:2]
    monkeypatch.setattr(
        search.search_mixer,
        "__kwdefaults__",
        {**search.search_mixer.__kwdefaults__, "moves": kept},
    )


@pytest.fixture
def text(tmp_path):
    order = random.Random(4)
    path = tmp_path / "ids.jsonl"
    lines = (json.dumps({"ids": [order.randrange(3, 96) for _ in range(40)]}) for _ in range(40))
    path.write_text("\n".join(lines) + "\n")
    return path


def source_of(tmp_path, kind="deepseek_v3", **fields):
    folder = write_tiny_checkpoint(tmp_path / "teacher", tiny_config(kind, **fields))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (example_checkpoint() / name).is_file():
            shutil.copy(example_checkpoint() / name, folder)
    return folder


@pytest.fixture(autouse=True)
def tokenizer_of_any_size(monkeypatch):
    """The ids are the text: a tokenizer is asked for the bytes of a token alone."""

    class Ids:
        vocab_size = 96

        def token_bytes(self, token_id):
            return b"abc"

    for module in ("calibration.calibration_text", "fitted"):
        name = f"kimi_convert.conversion.{module}.load_tokenizer"
        monkeypatch.setattr(name, lambda folder: Ids())
    monkeypatch.setattr("kimi_convert.conversion.provenance.tokenizer_files", lambda folder: ())


def recipe_of(method=InitMethod.SEARCH, steps=0, rate=2e-3, **fields):
    calibration = CalibrationRecipe(
        **FITTED, method=method, align=AlignRecipe(steps=steps, learning_rate=rate)
    )
    return Recipe(calibration=calibration, choose_layers=True, rope=RopeHandling.FOLD, **fields)


def convert(source, output, text, **options):
    return convert_checkpoint(source, output, text=text, **{"recipe": recipe_of(), **options})


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("trained", ["solved", "all"])
def test_quantised_teacher_is_fitted_as_its_plain_twin(tmp_path, text, trained):
    recipe = recipe_of() if trained == "solved" else distilled(steps=2, parameters="all")
    found = []
    for teacher in write_twins(tmp_path, "fp8", num_hidden_layers=2):
        output = tmp_path / f"from-{teacher.name}"
        convert(teacher, output, text, recipe=recipe)
        files = hashes(output)
        del files["conversion.json"]
        found.append(files)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"q_lora_rank": 20},
        {"first_k_dense_replace": 4},
        {"dtype": "bfloat16"},
        {"tie_word_embeddings": True},
        {"ling": True},
    ],
    ids=["moe", "low-rank-q", "dense", "bf16", "tied", "bailing_hybrid"],
)
def test_fitted_checkpoint_is_whole_and_computes_the_same_in_every_form(tmp_path, text, fields):
    form = TargetFormat.BAILING_HYBRID if fields.pop("ling", False) else TargetFormat.KIMI_LINEAR
    source = source_of(tmp_path, **fields)
    recipe = recipe_of(output_format=form)
    result = convert(source, tmp_path / "hybrid", text, recipe=recipe)
    checks = frozenset({Check.VALUES, Check.HASHES, Check.CONSISTENCY})
    report = validate_checkpoint(
        result.output, options=ValidationOptions(checks=checks, consistency_tokens=32)
    )
    assert report.findings == ()
    assert report.passed
    assert result.fit is not None
    assert result.plan.target_config.mla_layers == result.fit.kept
    assert not (tmp_path / f"hybrid{WORK_SUFFIX}").exists()


def test_report_has_every_layer_and_both_costs(tmp_path, text):
    result = convert(source_of(tmp_path), tmp_path / "hybrid", text)
    document = json.loads((result.output / "conversion.json").read_text())["calibration"]
    assert [layer["layer"] for layer in document["layers"]] == [0, 1, 2, 3]
    for layer in document["layers"]:
        assert layer["kl_as_kda"] > 0
        assert layer["kl_as_mla"] > 0
        assert 0 < layer["error"] < 1
        # A least-squares solution is as long as its angle to the target says, on its own tokens.
        assert 0 < layer["cosine"] <= 1
        assert layer["norm_ratio"] > 0
        assert 0 < layer["stream_error"] < 1
        assert (layer["router_agreement"] is None) == (layer["layer"] == 0)  # which is dense
        assert layer["router_agreement"] is None or 0 < layer["router_agreement"] <= 1
        assert len(layer["solved"]["heads"]) == 4
        assert all(head["error"] > 0 for head in layer["solved"]["heads"])
        assert (layer["eps_share"] is None) == (layer["mixer"] == "mla")
        assert (layer["half_life"] is None) == (layer["mixer"] == "mla")
        assert layer["beta"] is None or 0 < layer["beta"] < 1
        assert sum(layer["bases"].values()) == 4
    assert document["compared"][0]["kept"] == [3]
    best = min(document["compared"], key=lambda one: one["kl"])
    assert document["kept"] == best["kept"] != [3]
    assert [one["kept"] for one in document["long_context"]["sets"]] == [[3], best["kept"]]
    assert document["validation"]["tokens"] == 4 * LENGTH
    by_position = document["validation"]["kl_by_position"]
    assert by_position == {"0 to 23": pytest.approx(document["validation"]["kl"])}


@pytest.mark.parametrize("steps", [0, 2], ids=["fitted", "distilled"])
def test_probes_in_the_report_are_those_of_the_written_checkpoint(tmp_path, text, steps):
    source = source_of(tmp_path)
    recipe = distilled(recipe_of(), steps=steps)
    result = convert(source, tmp_path / "hybrid", text, recipe=recipe)
    document = json.loads((result.output / "conversion.json").read_text())["calibration"]
    config = read_config(source)
    given = calibration_text(text, source, config, recipe.calibration, seed=recipe.seed)
    drawn = probes_of(given.tokens, config, seed=recipe.seed)
    assert [probe["name"] for probe in document["probes"]] == ["copying", "induction", "pairs"]
    for probe, one in zip(document["probes"], drawn, strict=True):
        assert probe["answers"] == one.probe.asked.sum()
        for who, folder in (("student", result.output), ("teacher", source)):
            with torch.no_grad():
                likeliest = load_model(folder)(one.probe.inputs).argmax(-1)[one.probe.asked]
            right = (likeliest == one.probe.answers).double().mean().item()
            assert probe[who] == pytest.approx(right, abs=1.01 / probe["answers"])
    said = [section for section in fit_report(result.fit) if isinstance(section, Table)]
    assert any(len(table.rows) == len(drawn) and "hybrid" in table.columns for table in said)


def test_choice_that_could_be_chance_is_the_released_pattern_and_said(tmp_path, text, monkeypatch):
    monkeypatch.setattr(choice, "_STANDARD_ERRORS", 1e9)
    result = convert(source_of(tmp_path), tmp_path / "hybrid", text)
    assert result.fit is not None
    assert result.fit.kept == (3,) != min(result.fit.compared, key=lambda one: one.kl).kept
    assert result.fit.long_context is None
    said = [part.text for part in fit_report(result.fit) if isinstance(part, Sentence)]
    assert any("Chance could have put" in text for text in said)


def test_choice_that_does_not_hold_at_length_is_overturned_and_said(tmp_path, text, monkeypatch):
    def nearer(*given):
        released, chosen = given[2]
        return LongContext(length=96, kl_of={released: 0.25, chosen: 0.5})

    monkeypatch.setattr(run, "compare_at_length", nearer)
    result = convert(source_of(tmp_path), tmp_path / "hybrid", text)
    assert result.fit is not None
    assert result.fit.kept == result.plan.target_config.mla_layers == (3,)
    said = [part.text for part in fit_report(result.fit) if isinstance(part, Sentence)]
    assert any("At 96 tokens" in text and "overturned" in text for text in said)


@pytest.mark.parametrize(
    "stage", ["fitting mixers", "choosing layers", "solving outputs", "converting"]
)
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path, text, stage, late):
    source = source_of(tmp_path)
    convert(source, tmp_path / "whole", text)

    def interrupt(event):
        if event.stage == stage and event.done >= (event.total // 2 if late else 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "again", text, on_progress=interrupt)
    assert not (tmp_path / "again").exists()
    work = tmp_path / f"again{WORK_SUFFIX}"
    finished = {path.name: path.stat().st_mtime_ns for path in work.glob("search-*")}
    seen = []
    convert(source, tmp_path / "again", text, on_progress=seen.append)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "whole")
    if stage != "fitting mixers":
        assert len(finished) == 4


def test_finished_layers_are_not_searched_again(tmp_path, text, monkeypatch):
    source = source_of(tmp_path)

    def interrupt(event):
        if event.stage == "choosing layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "again", text, on_progress=interrupt)

    def refuse(*_, **__):
        raise AssertionError("searched again")

    monkeypatch.setattr("kimi_convert.conversion.calibration.starts.search_mixer", refuse)
    convert(source, tmp_path / "again", text)


def test_another_recipe_does_not_go_on_with_these_layers(tmp_path, text):
    source = source_of(tmp_path)

    def interrupt(event):
        if event.stage == "solving outputs":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", text, on_progress=interrupt)
    with pytest.raises(OutputError, match="another conversion"):
        convert(source, tmp_path / "out", text, recipe=recipe_of(seed=1))


def test_two_runs_give_the_same_bytes(tmp_path, text):
    source = source_of(tmp_path)
    convert(source, tmp_path / "one", text)
    convert(source, tmp_path / "two", text)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


@pytest.mark.parametrize(
    "method",
    [method for method in InitMethod if method not in (InitMethod.COPY, InitMethod.SEARCH)],
)
def test_other_starts_go_the_same_way(tmp_path, text, method):
    result = convert(source_of(tmp_path), tmp_path / "out", text, recipe=recipe_of(method))
    assert result.fit is not None
    assert {layer.search["method"] for layer in result.fit.layers} == {str(method)}


def test_alignment_lowers_the_loss_of_every_layer(tmp_path, text):
    recipe = recipe_of(steps=30)
    result = convert(source_of(tmp_path), tmp_path / "out", text, recipe=recipe)
    assert result.fit is not None
    for layer in result.fit.layers:
        first, last = layer.solved["align_losses"]
        assert last < first
        assert layer.solved["align_tokens"] == 30 * (512 // LENGTH) * LENGTH


def test_alignment_that_diverges_is_exit_6_and_keeps_what_is_finished(tmp_path, text, monkeypatch):
    monkeypatch.setattr(align, "_DIVERGED", 0.0)
    with pytest.raises(VerificationError, match="diverges") as caught:
        convert(source_of(tmp_path), tmp_path / "out", text, recipe=recipe_of(steps=3))
    assert "layer 0" in caught.value.where
    assert len(list((tmp_path / f"out{WORK_SUFFIX}").glob("search-*"))) == 4


def test_solve_that_is_not_finite_names_its_layer(tmp_path, text, monkeypatch):
    real = outputs.moments
    calls = []

    def spoiled(z, y):
        calls.append(z)
        return real(z * float("nan"), y) if len(calls) > 30 else real(z, y)

    monkeypatch.setattr(outputs, "moments", spoiled)
    with pytest.raises(CalibrationError, match="no solution") as caught:
        convert(source_of(tmp_path), tmp_path / "out", text)
    assert caught.value.where.startswith("layer ")
    assert caught.value.where != "layer 0"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dead", ["input_layernorm", "o_proj"], ids=["reads-0", "writes-0"])
def test_layer_that_does_nothing_is_converted_to_one_that_does_nothing(tmp_path, text, dead):
    source = source_of(tmp_path)

    def silence(tensors):
        for name, values in tensors.items():
            if f"layers.1.{dead}" in name or f"layers.1.self_attn.{dead}" in name:
                values.zero_()

    edit_tensors(source, silence)
    result = convert(source, tmp_path / "out", text)
    assert result.fit is not None
    assert result.fit.layers[1].mixer == "kda"
    assert result.fit.layers[1].kl_as_kda == pytest.approx(0, abs=1e-4)


def test_matrix_that_cannot_be_decomposed_names_its_layer(tmp_path, text, monkeypatch):
    def singular(*_):
        raise torch.linalg.LinAlgError("the input matrix is singular")

    monkeypatch.setattr("kimi_convert.conversion.calibration.statistics._maps", singular)
    with pytest.raises(CalibrationError, match="cannot be solved") as caught:
        convert(source_of(tmp_path), tmp_path / "out", text)
    assert caught.value.where == "layer 0"
    assert "singular" in caught.value.found


def test_solve_that_does_harm_is_replaced_and_said(tmp_path, text, monkeypatch):
    real = outputs.fit_ridge

    def harmful(parts):
        fitted = real(parts)
        return type(fitted)(-5 * fitted.solution, fitted.penalty, fitted.error)

    monkeypatch.setattr(outputs, "fit_ridge", harmful)
    result = convert(source_of(tmp_path), tmp_path / "out", text)
    assert result.fit is not None
    assert {layer.output for layer in result.fit.layers} <= {"teacher-forced", "switched off"}


def test_gradients_are_as_they_were_after_a_calibration(tmp_path, text):
    assert torch.is_grad_enabled()
    convert(source_of(tmp_path), tmp_path / "out", text)
    assert torch.is_grad_enabled()


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that is not the CPU, in this thread and in those of the search."""
    monkeypatch.setattr(torch, "lazy", torch.cpu, raising=False)  # what `checkpoint` looks up
    real = ahead.SearchPool._run

    def run(*given):
        with pretended_device():
            real(*given)

    monkeypatch.setattr(ahead.SearchPool, "_run", run)
    with pretended_device() as device:
        yield device


@pytest.mark.parametrize("parameters", DistilledParameters)
def test_every_tensor_of_a_calibration_is_on_its_device(tmp_path, text, elsewhere, parameters):
    recipe = distilled(recipe_of(steps=1), steps=1, parameters=parameters)
    source = source_of(tmp_path, num_hidden_layers=2)
    there = convert(source, tmp_path / "there", text, recipe=recipe, device=elsewhere).fit
    here = convert(source, tmp_path / "here", text, recipe=recipe).fit
    assert there is not None
    assert here is not None
    assert there.validation.kl == pytest.approx(here.validation.kl, rel=1e-3)


def distilled(recipe=None, *, steps=16, rate=1e-3, written=0, parameters="mixers"):
    recipe = recipe or recipe_of(InitMethod.NAIVE)
    assert recipe.calibration is not None
    distill = DistillRecipe(
        tokens=steps * 8 * LENGTH,
        tokens_per_step=8 * LENGTH,
        learning_rate=rate,
        written_tokens=written,
        parameters=DistilledParameters(parameters),
    )
    return replace(recipe, calibration=replace(recipe.calibration, distill=distill))


@pytest.fixture
def fresh(tmp_path):
    """As `text`, but enough to train on that the output matrices were not solved on."""
    order = random.Random(4)
    path = tmp_path / "fresh.jsonl"
    rows = ([order.randrange(3, 96) for _ in range(40)] for _ in range(400))
    path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    return path


def test_distillation_brings_the_student_nearer_and_is_reported(tmp_path, fresh):
    result = convert(source_of(tmp_path), tmp_path / "out", fresh, recipe=distilled())
    assert result.fit is not None
    note = result.fit.distilled
    assert note is not None
    assert note["steps"] == 16
    assert note["losses"][1] < note["losses"][0]
    assert note["taken"]
    assert note["after"]["kl"] < note["before"]["kl"]
    assert result.fit.validation.kl == note["after"]["kl"]


@pytest.mark.parametrize("trained", ["solved", "aligned", "distilled"])
@pytest.mark.parametrize(
    ("form", "fields"),
    [
        (TargetFormat.KIMI_LINEAR, {}),
        (TargetFormat.KIMI_LINEAR, {"q_lora_rank": 20}),
        (TargetFormat.BAILING_HYBRID, {"rms_norm_eps": 1e-6}),
    ],
    ids=["full-q", "low-rank-q", "bailing_hybrid"],
)
def test_written_checkpoint_is_as_near_as_the_report_says(tmp_path, fresh, trained, form, fields):
    recipes = {"solved": recipe_of(), "aligned": recipe_of(steps=30), "distilled": distilled()}
    recipe = replace(recipes[trained], output_format=form)
    source = source_of(tmp_path, **fields)
    result = convert(source, tmp_path / "out", fresh, recipe=recipe)
    assert result.fit is not None
    assert result.fit.distilled is None or result.fit.distilled["taken"]
    rows = calibration_text(fresh, source, read_config(source), recipe.calibration, seed=0)
    check = rows.tokens[-rows.validation_rows :]
    teacher, student = (load_model(folder) for folder in (source, result.output))
    with torch.no_grad():
        expected, found = (m(check[:, :-1]).log_softmax(-1) for m in (teacher, student))
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert kl == pytest.approx(result.fit.validation.kl, rel=1e-3)


def test_distillation_that_does_not_help_is_not_taken(tmp_path, text, monkeypatch):
    def harm(training, step, tokens):
        for layer in training.hybrid.layers:
            layer.matrix.data.mul_(-3)

    monkeypatch.setattr(distill._Training, "_step", harm)
    result = convert(source_of(tmp_path), tmp_path / "out", text, recipe=distilled(steps=2))
    assert result.fit is not None
    assert not result.fit.distilled["taken"]
    assert result.fit.validation.kl == result.fit.distilled["before"]["kl"]


def test_interrupted_distillation_goes_on_from_its_last_state(tmp_path, text, monkeypatch):
    monkeypatch.setattr(distill, "_SAVE_EVERY", 4)
    source, recipe = source_of(tmp_path), distilled(steps=12, written=8 * LENGTH)
    convert(source, tmp_path / "whole", text, recipe=recipe)

    def interrupt(event):
        if event.stage == "distilling" and event.done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", text, recipe=recipe, on_progress=interrupt)
    steps = []

    def note(event):
        if event.stage == "distilling":
            steps.append(event.done)

    convert(source, tmp_path / "out", text, recipe=recipe, on_progress=note)
    assert steps[0] == 4
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_loss_that_is_not_finite_ends_distillation(tmp_path, text):
    with pytest.raises(VerificationError, match="distillation diverges"):
        monstrous = distilled(steps=30, rate=1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distill, "_CLIP", float("inf"))
            patch.setattr(hybrid, "step_size", lambda *_: 1e30)
            convert(source_of(tmp_path), tmp_path / "out", text, recipe=monstrous)
