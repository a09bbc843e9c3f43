"""All parameters of a hybrid distilled, not its mixers alone: what changes, what is said, what stays."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import replace

import pytest
import torch

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.config.calibration import (
    CalibrationRecipe,
    DistilledParameters,
    DistillRecipe,
    InitMethod,
)
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.output_format import OutputFormat, TargetDtype
from kimi_convert.config.recipe import Recipe
from kimi_convert.config.target_format import TargetFormat
from kimi_convert.conversion import engine
from kimi_convert.conversion.align_stages import AlignRequest
from kimi_convert.conversion.aligned import align_checkpoint
from kimi_convert.conversion.calibration import distill, distill_pair, probing
from kimi_convert.conversion.calibration.calibration_text import calibration_text
from kimi_convert.conversion.calibration.ranks import Ranks
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.fitted import convert_checkpoint
from kimi_convert.conversion.plan import plan_conversion
from kimi_convert.errors import ConfigError, RecipeError
from kimi_convert.model.loading import load_model, open_layers
from kimi_convert.validation import Check, ValidationOptions, validate_checkpoint
from tests.tiny import tiny_config, write_tiny_checkpoint

LENGTH = 24
STEPS = 12
BIAS = "e_score_correction_bias"
FORMATS = {
    "kimi_linear": (TargetFormat.KIMI_LINEAR, {"dtype": "bfloat16"}),
    "tied": (TargetFormat.KIMI_LINEAR, {"tie_word_embeddings": True}),
    "bailing_hybrid": (TargetFormat.BAILING_HYBRID, {"rms_norm_eps": 1e-6}),
}


def recipe_of(parameters=DistilledParameters.ALL, *, form=TargetFormat.KIMI_LINEAR):
    fitted = CalibrationRecipe(
        method=InitMethod.NAIVE,
        tokens=60 * LENGTH,
        sequence_length=LENGTH,
        search_tokens=8 * LENGTH,
        validation_tokens=4 * LENGTH,
        distill=DistillRecipe(
            tokens=STEPS * 8 * LENGTH, tokens_per_step=8 * LENGTH, parameters=parameters
        ),
    )
    return Recipe(calibration=fitted, output_format=form, keep_layers=(1,))


def request_of(folder, recipe=None):
    calibration = (recipe or recipe_of()).calibration
    assert calibration is not None
    return AlignRequest(calibration=calibration, text=folder / "ids.jsonl")


def teacher_of(folder, **fields):
    """A teacher whose tokenizer is the example's, and a text."""
    config = tiny_config("deepseek_v3", num_hidden_layers=2, vocab_size=4096, **fields)
    teacher = write_tiny_checkpoint(folder / "teacher", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(example_checkpoint() / name, teacher)
    order = random.Random(4)
    rows = ([order.randrange(300, 400) for _ in range(40)] for _ in range(200))
    (folder / "ids.jsonl").write_text("".join(json.dumps({"ids": r}) + "\n" for r in rows))
    return teacher


def pair_of(folder, form=TargetFormat.KIMI_LINEAR, **fields):
    teacher = teacher_of(folder, **fields)
    engine.convert_checkpoint(teacher, folder / "hybrid", recipe=Recipe(output_format=form))
    return teacher, folder / "hybrid"


def converted(folder, name="out", recipe=None, **options):
    recipe = recipe or recipe_of()
    text = folder / "ids.jsonl"
    return convert_checkpoint(
        folder / "teacher", folder / name, recipe=recipe, text=text, **options
    )


def tensors(folder):
    index = open_index(folder)
    with CheckpointReader(index) as reader:
        return {name: reader.tensor(name).clone() for name in index.tensors}


def changed(before, after):
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    return {name for name in before if not torch.equal(before[name], after[name])}


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def kl_of(folder, teacher, student):
    recipe = recipe_of().calibration
    assert recipe is not None
    text = calibration_text(folder / "ids.jsonl", teacher, read_config(teacher), recipe, seed=0)
    check = text.tokens[-text.validation_rows :, :-1]
    with torch.no_grad():
        expected, found = (load_model(path)(check).log_softmax(-1) for path in (teacher, student))
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


@pytest.mark.parametrize(
    ("form", "fields"), [FORMATS["kimi_linear"], FORMATS["bailing_hybrid"]], ids=["kimi", "ling"]
)
def test_aligned_hybrid_is_new_but_for_what_no_gradient_reaches(tmp_path, form, fields):
    teacher, student = pair_of(tmp_path, form, **fields)
    result = align_checkpoint(teacher, student, tmp_path / "out", request=request_of(tmp_path))
    assert result is not None
    assert result.distilled is not None
    assert result.distilled["taken"]
    assert result.after.kl < result.before.kl
    assert kl_of(tmp_path, teacher, student) == pytest.approx(result.before.kl, rel=1e-3)
    assert kl_of(tmp_path, teacher, result.output) == pytest.approx(result.after.kl, rel=1e-3)
    before, after = tensors(student), tensors(result.output)
    kept = before.keys() - changed(before, after)
    assert {name.rpartition(".")[2] for name in kept} == {
        BIAS if fields.get("dtype") else "expert_bias"
    }
    options = ValidationOptions(checks=frozenset({Check.VALUES, Check.HASHES}))
    assert validate_checkpoint(result.output, options=options).passed


@pytest.mark.parametrize(("form", "fields"), FORMATS.values(), ids=FORMATS)
def test_converted_hybrid_is_as_near_as_the_report_says_and_the_record_is_true(
    tmp_path, form, fields
):
    teacher = teacher_of(tmp_path, **fields)
    result = converted(tmp_path, recipe=recipe_of(form=form))
    assert result.fit is not None
    note = result.fit.distilled
    assert note is not None
    assert note["taken"]
    assert note["after"]["kl"] < note["before"]["kl"]
    assert kl_of(tmp_path, teacher, result.output) == pytest.approx(note["after"]["kl"], rel=1e-3)
    record = json.loads((result.output / "conversion.json").read_text())
    assert record["recipe"]["distill"]["parameters"] == "all"
    carried = {name for name, how in record["tensors"].items() if how["op"] != "fitted"}
    sources = {name for n in carried for name in record["tensors"][n]["sources"]}
    assert sources == {f"model.layers.1.mlp.gate.{BIAS}"}
    assert record["copied_source_sha256"].keys() == sources
    (bias,) = carried
    old, new = tensors(teacher), tensors(result.output)
    assert torch.equal(new[bias], old[f"model.layers.1.mlp.gate.{BIAS}"])
    assert result.plan.copied_bytes == new[bias].nbytes
    for name in ("model.norm.weight", "lm_head.weight"):
        assert not torch.equal(new[name], old.get(name, old["model.embed_tokens.weight"]))
    options = ValidationOptions(checks=frozenset({Check.VALUES, Check.HASHES}))
    assert validate_checkpoint(result.output, options=options).passed


def test_probes_are_asked_of_the_hybrid_as_it_is_written(tmp_path, monkeypatch):
    asked = []

    def record(probe, stream, head):
        asked.append((probe.inputs, head(stream)))
        return 0.0

    monkeypatch.setattr(probing, "accuracy", record)
    teacher = teacher_of(tmp_path)
    hybrid = converted(tmp_path).output
    assert len(asked) == 6
    with torch.no_grad():
        for (inputs, logits), folder in zip(asked, 3 * [hybrid, teacher], strict=True):
            torch.testing.assert_close(logits, load_model(folder)(inputs), rtol=1e-3, atol=1e-4)


def test_more_parameters_come_nearer_than_mixers_alone(tmp_path):
    teacher, student = pair_of(tmp_path)
    reached = [
        align_checkpoint(
            teacher,
            student,
            tmp_path / parameters,
            request=request_of(tmp_path, recipe_of(parameters)),
        )
        for parameters in DistilledParameters
    ]
    mixers, everything = (result.after.kl for result in reached if result is not None)
    assert everything < mixers


def test_teacher_stays_as_it_is_while_all_of_the_student_is_trained(tmp_path, monkeypatch):
    teacher, student = pair_of(tmp_path)
    hybrids = []
    real = distill_pair._hybrid
    monkeypatch.setattr(
        distill_pair, "_hybrid", lambda *a, **k: hybrids.append(real(*a, **k)) or hybrids[-1]
    )
    request = request_of(tmp_path)
    text = calibration_text(
        request.text, teacher, read_config(teacher), request.calibration, seed=0
    )
    store = CalibrationStore(tmp_path / "store", "digest")
    with torch.no_grad(), open_layers(teacher) as guide, open_layers(student) as layers:
        distill_pair.distill_pair(
            guide,
            layers,
            text,
            request.calibration.distill,
            store,
            lambda event: None,
            ranks=Ranks(),
            seed=0,
        )
    (hybrid,) = hybrids
    whole = load_model(teacher)
    frozen = {
        "embed": (hybrid.teacher_ends.embed, whole.embed),
        "head": (hybrid.teacher_ends.head, whole.head),
        "norm": (hybrid.teacher_ends.head.norm, whole.norm),
        **{str(n): (layer.teacher, whole.layers[n]) for n, layer in enumerate(hybrid.layers)},
    }
    for found, expected in frozen.values():
        theirs = dict(expected.named_parameters())
        for name, value in found.named_parameters():
            assert torch.equal(value, theirs[name])
            assert value.grad is None
    expected = {name for name, _ in load_model(student).named_parameters() if "bias" not in name}
    assert len(hybrid.trained()) == len({*expected, "layers.0.kda.dt_bias"})


@pytest.mark.parametrize("path", ["convert", "align"])
def test_interrupted_training_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch, path):
    monkeypatch.setattr(distill, "_SAVE_EVERY", 4)
    pair = pair_of(tmp_path)

    def run(name, **options):
        if path == "convert":
            return converted(tmp_path, name, **options)
        return align_checkpoint(*pair, tmp_path / name, request=request_of(tmp_path), **options)

    run("whole")

    def interrupt(event):
        if event.stage == "distilling" and event.done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("again", on_progress=interrupt)
    steps = []
    run("again", on_progress=lambda e: steps.append(e.done) if e.stage == "distilling" else None)
    assert steps[0] == 4
    assert hashes(tmp_path / "again") == hashes(tmp_path / "whole")


def test_training_that_does_not_help_leaves_every_byte(tmp_path, monkeypatch):
    def harm(training, step, tokens):
        training.hybrid.ends.embed.weight.data.mul_(-3)

    monkeypatch.setattr(distill._Training, "_step", harm)
    teacher, student = pair_of(tmp_path, dtype="bfloat16")
    result = align_checkpoint(teacher, student, tmp_path / "out", request=request_of(tmp_path))
    assert result is not None
    assert result.distilled is not None
    assert not result.distilled["taken"]
    assert not changed(tensors(student), tensors(result.output))


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path):
    teacher, student = pair_of(tmp_path)
    with pytest.raises(RecipeError, match="source's dtype"):
        plan_conversion(teacher, recipe_of(), output_format=OutputFormat(dtype=TargetDtype.FP8))
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ConfigError, match="embedding"):
        align_checkpoint(teacher, student, tmp_path / "out", request=request_of(tmp_path))
    assert not (tmp_path / "out.calibration").exists()


def test_all_is_trained_only_where_there_are_steps():
    recipe = recipe_of().calibration
    assert recipe is not None
    assert recipe.distill.trains_all
    assert not replace(recipe.distill, tokens=0).trains_all
