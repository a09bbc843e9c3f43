"""An existing hybrid aligned to its teacher, on small random models."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch

from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.config.calibration import AlignRecipe, CalibrationRecipe
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.recipe import Recipe
from kimi_convert.config.target_format import TargetFormat
from kimi_convert.conversion import engine
from kimi_convert.conversion.aligned import AlignRequest, align_checkpoint
from kimi_convert.conversion.calibration import align, outputs, realign
from kimi_convert.conversion.calibration.calibration_text import calibration_text
from kimi_convert.conversion.calibration.realign import Targets
from kimi_convert.conversion.fitted import WORK_SUFFIX
from kimi_convert.errors import ConfigError, OutputError, VerificationError
from kimi_convert.model.loading import load_model
from kimi_convert.validation import Check, ValidationOptions, validate_checkpoint
from tests.tiny import tiny_config, write_tiny_checkpoint

LENGTH = 24


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


@pytest.fixture
def text(tmp_path):
    order = random.Random(4)
    path = tmp_path / "ids.jsonl"
    lines = (json.dumps({"ids": [order.randrange(3, 96) for _ in range(40)]}) for _ in range(40))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def pair(tmp_path):
    """A teacher and a hybrid of it that no text was used for."""
    return make_pair(tmp_path)


def make_pair(tmp_path, recipe=None, **fields):
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tiny_config("deepseek_v3", **fields))
    student = tmp_path / "hybrid"
    engine.convert_checkpoint(teacher, student, recipe=recipe or Recipe())
    return teacher, student


def request_of(text, steps=20, **changes):
    calibration = CalibrationRecipe(
        tokens=60 * LENGTH,
        sequence_length=LENGTH,
        search_tokens=8 * LENGTH,
        validation_tokens=12 * LENGTH,
        align=AlignRecipe(steps=steps),
    )
    return AlignRequest(calibration=calibration, text=text, **changes)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def tensors(folder):
    index = open_index(folder)
    with CheckpointReader(index) as reader:
        return {name: reader.tensor(name).clone() for name in index.tensors}


@pytest.mark.parametrize("targets", Targets)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"q_lora_rank": 20},
        {"recipe": Recipe(output_format=TargetFormat.BAILING_HYBRID), "rms_norm_eps": 1e-6},
    ],
    ids=["full-q", "low-rank-q", "bailing_hybrid"],
)
def test_aligned_hybrid_is_nearer_and_as_near_as_the_report_says(tmp_path, text, targets, fields):
    teacher, student = make_pair(tmp_path, **fields)
    request = request_of(text, targets=targets)
    result = align_checkpoint(teacher, student, tmp_path / "out", request=request)
    assert result.after.kl < result.before.kl
    rows = calibration_text(text, teacher, read_config(teacher), request.calibration, seed=0)
    check = rows.tokens[-rows.validation_rows :]
    models = [load_model(folder) for folder in (teacher, student, result.output)]
    with torch.no_grad():
        expected, was, now = (model(check[:, :-1]).log_softmax(-1) for model in models)
    for found, told in ((was, result.before), (now, result.after)):
        kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
        assert kl == pytest.approx(told.kl, rel=1e-3)


def test_all_but_the_mixers_keeps_its_bytes(tmp_path, pair, text):
    teacher, student = pair
    result = align_checkpoint(teacher, student, tmp_path / "out", request=request_of(text))
    before, after = tensors(student), tensors(result.output)
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".self_attn." in name for name in changed)
    assert {name.split(".")[2] for name in changed} == {"0", "1", "2", "3"}


def test_record_of_the_conversion_is_kept_and_extended(tmp_path, pair, text):
    teacher, student = pair
    result = align_checkpoint(teacher, student, tmp_path / "out", request=request_of(text))
    before, after = (
        json.loads((folder / "conversion.json").read_text()) for folder in (student, result.output)
    )
    told = after.pop("export")
    assert after == before
    assert told["aligned"]["teacher"]["name"] == "teacher"
    assert told["aligned"]["recipe"]["align"]["steps"] == 20
    assert [layer["layer"] for layer in told["aligned"]["layers"]] == [0, 1, 2, 3]
    checks = frozenset({Check.VALUES, Check.HASHES, Check.CONSISTENCY})
    options = ValidationOptions(checks=checks, consistency_tokens=32)
    assert validate_checkpoint(result.output, options=options).passed


def test_interrupted_alignment_goes_on_and_gives_the_same_bytes(tmp_path, pair, text):
    teacher, student = pair
    request = request_of(text, steps=4)
    align_checkpoint(teacher, student, tmp_path / "whole", request=request)

    def interrupt(event):
        if event.stage == "aligning layers" and event.done == 2:
            raise KeyboardInterrupt

    again = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        align_checkpoint(teacher, student, again, request=request, on_progress=interrupt)
    assert not again.exists()
    work = tmp_path / f"again{WORK_SUFFIX}"
    assert len(list(work.glob("aligned-*"))) == 2
    trained = []
    real = realign.align_mixer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(realign, "align_mixer", lambda *a, **k: trained.append(1) or real(*a, **k))
        align_checkpoint(teacher, student, again, request=request)
    assert len(trained) == 2
    assert hashes(again) == hashes(tmp_path / "whole")
    assert not work.exists()
    with pytest.raises(OutputError):
        align_checkpoint(teacher, student, again, request=request)


def test_alignment_that_diverges_is_exit_6_with_the_layer(tmp_path, pair, text, monkeypatch):
    monkeypatch.setattr(align, "_DIVERGED", 0.0)
    with pytest.raises(VerificationError, match="diverges") as caught:
        align_checkpoint(*pair, tmp_path / "out", request=request_of(text, steps=3))
    assert caught.value.where == "layer 0"
    assert not (tmp_path / "out").exists()


def test_layer_that_would_end_worse_stays_as_it_was(tmp_path, pair, text, monkeypatch):
    real = outputs.fit_ridge

    def harmful(parts):
        fitted = real(parts)
        return type(fitted)(-5 * fitted.solution, fitted.penalty, fitted.error)

    monkeypatch.setattr(outputs, "fit_ridge", harmful)
    monkeypatch.setattr(align, "_DIVERGED", float("inf"))
    # Towards itself: switched off, which a bad solve falls back to, is worse than what there is.
    monkeypatch.setattr("kimi_convert.conversion.aligned._check_pair", lambda *_, **__: None)
    student = pair[1]
    result = align_checkpoint(student, student, tmp_path / "out", request=request_of(text, 2))
    assert {layer.output for layer in result.layers} == {realign.AS_IT_WAS}
    before, after = tensors(student), tensors(result.output)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"hidden_size": 48}, "hidden_size"),
        ({"num_hidden_layers": 5}, "num_hidden_layers"),
        ({"kv_lora_rank": 16}, "mla"),
        ({"n_routed_experts": 12}, "moe"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_teacher_of_another_shape_is_refused(tmp_path, pair, text, fields, word):
    other = write_tiny_checkpoint(tmp_path / "other", tiny_config("deepseek_v3", **fields))
    with pytest.raises(ConfigError, match=word):
        align_checkpoint(other, pair[1], tmp_path / "out", request=request_of(text))
    assert not (tmp_path / "out").exists()


def test_two_of_a_kind_are_refused(tmp_path, pair, text):
    teacher, student = pair
    with pytest.raises(ConfigError, match="nothing to align"):
        align_checkpoint(teacher, teacher, tmp_path / "out", request=request_of(text))
    with pytest.raises(ConfigError, match="cannot be converted"):
        align_checkpoint(student, student, tmp_path / "out", request=request_of(text))


def test_hybrid_whose_storage_would_be_lost_is_refused(tmp_path, pair, text):
    teacher, student = pair
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    with pytest.raises(ConfigError, match="as it is stored"):
        align_checkpoint(teacher, student, tmp_path / "out", request=request_of(text))


@pytest.mark.parametrize("inside", ["teacher", "hybrid"])
def test_output_inside_an_input_is_refused_before_any_work(tmp_path, pair, text, inside):
    with pytest.raises(OutputError):
        align_checkpoint(*pair, tmp_path / inside / "out", request=request_of(text))
    assert not list(tmp_path.rglob(f"*{WORK_SUFFIX}"))
