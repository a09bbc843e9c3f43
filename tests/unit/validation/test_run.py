"""The whole of validation: what passes, what fails, what is not run and why."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch

from kimi_convert.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    KernelInputError,
    UsageError,
)
from kimi_convert.kernels.kda import recurrent_kda
from kimi_convert.model import kda
from kimi_convert.validation import (
    Check,
    Severity,
    ValidationOptions,
    memory_need,
    validate_checkpoint,
)
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.validation.build import (
    TEACHER,
    edit_tensors,
    record_hashes,
    write_hybrid,
    write_json,
    write_token_ids,
)

MEASURED = (Check.QUALITY, Check.ABLATION, Check.REPLACEMENT, Check.PROBES, Check.GREEDY)
SHORT = ValidationOptions(sequence_length=16, consistency_tokens=20, greedy_tokens=4, seed=4)


def validate(checkpoint, **arguments):
    return validate_checkpoint(checkpoint, **{"options": SHORT, **arguments})


def why_not(report):
    return {one.check: one.why for one in report.not_run}


@pytest.fixture
def hybrid(tmp_path):
    return write_hybrid(tmp_path / "hybrid", seed=1)


@pytest.fixture
def teacher(tmp_path):
    return write_tiny_checkpoint(tmp_path / "teacher", TEACHER, seed=2)


@pytest.fixture
def text(tmp_path):
    return write_token_ids(tmp_path / "ids.jsonl", rows={"a": 3, "b": 1})


def test_sound_checkpoint_passes_every_check(hybrid, teacher, text):
    record_hashes(hybrid)
    report = validate(hybrid, teacher=teacher, text=text)
    assert report.passed
    assert (report.findings, report.not_run) == ((), ())
    assert report.consistency.tokens == "text"
    assert report.quality.student.overall.kl > 0
    assert report.quality.ablated is not None
    assert report.quality.greedy.prompts == 4
    assert report.text.tokens_by_kind == {"a": 48, "b": 16}


def test_report_is_json_that_says_how_to_repeat_it(hybrid, teacher, text):
    report = validate(hybrid, teacher=teacher, text=text)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (document["format"], document["passed"]) == (1, True)
    assert document["checkpoint"] == str(hybrid)
    assert document["teacher"] == str(teacher)
    assert document["text"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert document["options"]["seed"] == 4
    assert document["options"]["dtype"] == "float32"
    assert document["options"]["numerics"]["router_weight"] == "unbiased"
    assert document["environment"]["torch"] == torch.__version__
    assert document["consistency"]["bound"] == 1e-5
    assert document["quality"]["student"]["by_kind"]["b"]["tokens"] == 16
    assert document["quality"]["layers"][3]["converted"] is False


def test_same_call_gives_the_same_report(hybrid, teacher, text):
    first, second = (validate(hybrid, teacher=teacher, text=text) for _ in range(2))
    assert first == second


def test_without_a_text_random_tokens_stand_in(hybrid, teacher):
    report = validate(hybrid, teacher=teacher)
    assert report.passed
    assert report.consistency.tokens == "random"
    assert (report.quality, report.text) == (None, None)
    said = "no text was given"
    assert why_not(report) == dict.fromkeys(MEASURED, said)


def test_without_a_teacher_there_is_no_ablation(hybrid, text):
    report = validate(hybrid, text=text)
    assert report.quality.student.overall.kl is None
    said = "no teacher was given"
    assert why_not(report) == {
        Check.ABLATION: "no teacher with other mixers was given",
        Check.REPLACEMENT: said,
        Check.GREEDY: said,
    }
    assert [probe.teacher for probe in report.quality.probes] == [None, None, None]


def test_checks_can_be_left_out(hybrid, text):
    options = replace(SHORT, checks=frozenset((Check.VALUES,)))
    report = validate(hybrid, text=text, options=options)
    assert (report.consistency, report.quality) == (None, None)
    assert report.integrity.values_scanned == report.integrity.tensors
    assert why_not(report) == dict.fromkeys(
        (Check.HASHES, Check.CONSISTENCY, *MEASURED), "left out by the options"
    )


def test_models_too_large_for_memory_are_measured_without_writing(
    hybrid, teacher, text, monkeypatch
):
    # One layer fits, the whole of either does not.
    monkeypatch.setattr(
        memory_need, "free_memory_bytes", lambda: memory_need.PROCESS_BYTES + 200_000
    )
    report = validate(hybrid, teacher=teacher, text=text)
    assert report.quality.greedy is None
    assert report.quality.probes
    assert why_not(report)[Check.GREEDY].startswith("a whole model takes")


def spoil(tensors):
    if "model.norm.weight" in tensors:
        tensors["model.norm.weight"][3] = math.nan


def drop(tensors):
    tensors.pop("lm_head.weight", None)


def test_damaged_checkpoint_fails_and_is_not_run(hybrid, teacher, text):
    edit_tensors(hybrid, spoil)
    report = validate(hybrid, teacher=teacher, text=text)
    assert not report.passed
    assert [found.where for found in report.findings] == ["model.norm.weight"]
    assert (report.consistency, report.quality) == (None, None)
    assert set(why_not(report).values()) == {"the checkpoint is damaged"}


def test_checkpoint_that_lacks_a_tensor_fails_and_is_not_run(tmp_path):
    folder = write_hybrid(tmp_path, num_shards=1)
    edit_tensors(folder, drop)
    report = validate(folder)
    assert not report.passed
    assert "lm_head.weight" in report.findings[0].found
    assert report.consistency is None


def test_other_bytes_than_recorded_fail_and_are_still_measured(hybrid, text):
    record = record_hashes(hybrid)
    record["files"]["config.json"]["sha256"] = "0" * 64
    write_json(hybrid / "conversion.json", record)
    report = validate(hybrid, text=text)
    assert not report.passed
    assert [found.check for found in report.findings] == [Check.HASHES]
    assert report.quality is not None
    assert report.consistency.passed


def test_warnings_do_not_fail(hybrid):
    record = record_hashes(hybrid)
    del record["tensors"]["lm_head.weight"]
    write_json(hybrid / "conversion.json", record)
    report = validate(hybrid)
    assert [found.severity for found in report.findings] == [Severity.WARNING]
    assert report.passed


def wrong(*args, **kwargs):
    output, state = recurrent_kda(*args, **kwargs)
    return output * 1.01, state


def test_forms_that_disagree_fail_with_error_and_bound(hybrid, text, monkeypatch):
    monkeypatch.setitem(kda._FORMS, kda.KdaForm.RECURRENT, wrong)
    report = validate(hybrid, text=text)
    assert not report.passed
    assert {found.check for found in report.findings} == {Check.CONSISTENCY}
    assert {found.expected for found in report.findings} == {"a relative error of at most 1.0e-05"}
    assert report.quality is not None


def test_values_that_overflow_on_the_text_are_a_finding(tmp_path, text):
    folder = write_hybrid(tmp_path / "large")

    def enlarge(tensors):
        for name in tensors:
            if name.endswith("o_proj.weight"):
                tensors[name] *= 1e6

    edit_tensors(folder, enlarge)
    options = replace(SHORT, dtype="float16", checks=frozenset((Check.QUALITY,)))
    report = validate(folder, text=text, options=options)
    assert not report.passed
    (found,) = report.findings
    assert (found.check, found.where) == (Check.QUALITY, str(folder))
    assert found.found == "NaN or Inf after layer 0"
    assert report.quality is None


def test_numbers_that_are_not_finite_are_null_in_json(hybrid, monkeypatch):
    def spoilt(*args, **kwargs):
        output, state = recurrent_kda(*args, **kwargs)
        return output * math.nan, state

    monkeypatch.setitem(kda._FORMS, kda.KdaForm.RECURRENT, spoilt)
    report = validate(hybrid)
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["consistency"]["forms"][0]["max_relative_error"] is None
    assert document["passed"] is False


def test_teacher_of_another_vocabulary_is_refused_before_anything_is_read(hybrid, text, tmp_path):
    other = write_tiny_checkpoint(tmp_path / "other", tiny_config("deepseek_v3", vocab_size=96))
    events = []
    with pytest.raises(CheckpointError, match="differ in vocab_size"):
        validate(hybrid, teacher=other, text=text, on_progress=events.append)
    assert events == []


@pytest.mark.parametrize(
    ("place", "error", "word"),
    [
        ({"device": "quantum"}, UsageError, "no such device"),
        ({"backend": "triton"}, KernelInputError, "need a CUDA device"),
    ],
    ids=["device", "backend"],
)
def test_place_where_nothing_can_run_is_refused_before_anything_is_read(
    place, error, word, hybrid, monkeypatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    events = []
    with pytest.raises(error, match=word):
        validate(hybrid, options=replace(SHORT, **place), on_progress=events.append)
    assert events == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"text": "none.jsonl"}, InputError, id="no-text-file"),
        pytest.param({"teacher": "none"}, ConfigError, id="no-teacher"),
    ],
)
def test_what_is_not_there_is_an_error(arguments, error, hybrid, tmp_path):
    with pytest.raises(error):
        validate(hybrid, **{name: tmp_path / path for name, path in arguments.items()})


def test_folder_that_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ConfigError):
        validate(tmp_path)


def test_progress_of_every_part_reaches_its_total(hybrid, teacher, text):
    record_hashes(hybrid)
    last = {}

    def note(event):
        last[event.stage] = (event.done, event.total)

    validate(hybrid, teacher=teacher, text=text, on_progress=note)
    assert set(last) == {
        "hashing files",
        "reading tensors",
        "comparing forms",
        "running layers",
        "scoring tokens",
        "writing greedily",
    }
    assert all(done == total > 0 for done, total in last.values())


def test_source_checkpoint_validates_on_its_own(teacher, text):
    report = validate(teacher, text=text)
    assert report.passed
    assert report.model_type == "deepseek_v3"
