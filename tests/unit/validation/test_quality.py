"""Quality against whole models run at once, and the numbers that must be exact."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from kimi_convert.config.huggingface import read_config
from kimi_convert.errors import CheckpointError, VerificationError
from kimi_convert.model.loading import LayerLoader, load_model
from kimi_convert.model.recall import probes_of
from kimi_convert.model.router_agreement import chosen_experts
from kimi_convert.model.text import PackedText
from kimi_convert.validation.options import Check, ValidationOptions
from kimi_convert.validation.quality import measure_quality
from kimi_convert.validation.text_streams import converted_layers
from tests.tiny import linear_attn_config, tiny_config, write_tiny_checkpoint
from tests.unit.validation.build import (
    HYBRID,
    TEACHER,
    edit_tensors,
    silent,
    switch_off_mixers,
    write_hybrid,
)

# Means of fp32 losses around 6 nats, each with an error of some 1e-6.
FP32 = 1e-5


def random_text(rows=5, length=24):
    tokens = torch.randint(300, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    kinds = tuple("ab"[n % 2] for n in range(rows))
    return PackedText(tokens=tokens, kinds=kinds, left_over={})


def measure(student, teacher=None, text=None, **options):
    return measure_quality(
        student,
        text or random_text(),
        teacher=teacher,
        options=ValidationOptions(**options),
        on_progress=silent,
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A student and a teacher, both random."""
    folder = tmp_path_factory.mktemp("pair")
    student = write_hybrid(folder / "student", seed=1)
    return student, write_tiny_checkpoint(folder / "teacher", TEACHER, seed=2)


@pytest.fixture(scope="module")
def report(pair):
    return measure(*pair)


@torch.inference_mode()
def log_probs(folder, text):
    return load_model(folder)(text.tokens[:, :-1]).double().log_softmax(-1)


def test_losses_and_divergence_are_those_of_whole_models(pair, report):
    text = random_text()
    q, p = (log_probs(folder, text) for folder in pair)
    targets = text.tokens[:, 1:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    scores = report.student.overall
    assert scores.tokens == 5 * 24
    assert scores.loss == pytest.approx(-q.gather(-1, targets).mean().item(), abs=FP32)
    assert scores.kl == pytest.approx(kl.mean().item(), abs=FP32)
    agreed = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert scores.top1_agreement == pytest.approx(agreed)
    teacher_loss = -p.gather(-1, targets).mean().item()
    assert report.teacher.overall.loss == pytest.approx(teacher_loss, abs=FP32)
    of_b = report.student.by_kind["b"]
    assert of_b.tokens == 2 * 24
    assert of_b.kl == pytest.approx(kl[1::2].mean().item(), abs=FP32)


@torch.inference_mode()
def test_layer_errors_are_those_of_whole_models(pair, report):
    text = random_text()
    student, teacher = (load_model(folder) for folder in pair)
    s = student.embed(text.tokens[:, :-1])
    t = teacher.embed(text.tokens[:, :-1])
    assert [layer.layer_idx for layer in report.layers] == [0, 1, 2, 3]
    for found, ours, theirs in zip(report.layers, student.layers, teacher.layers, strict=True):
        expected = theirs.mix(t)
        assert found.mixer_output == relative(ours.mix(s), expected)
        assert found.teacher_forced == relative(ours.mix(t), expected)
        s, t = ours(s), theirs(t)
        assert found.hidden == relative(s, t)


def relative(found, expected):
    error = (found - expected).double().square().sum() / expected.double().square().sum()
    # Each side of the ratio is a sum of squares of fp32 values that differ by some 1e-6.
    return pytest.approx(error.item(), rel=1e-4)


def test_layers_are_named_by_their_mixer(report):
    kinds = [(layer.mixer, layer.converted) for layer in report.layers]
    assert kinds == [("kda", True), ("kda", True), ("kda", True), ("mla", False)]


@pytest.mark.parametrize("config", [HYBRID, TEACHER], ids=["hybrid", "source"])
def test_model_is_no_distance_from_itself(config, tmp_path):
    write_tiny_checkpoint(tmp_path, config)
    found = measure(tmp_path, tmp_path)
    overall = found.student.overall
    assert (overall.kl, overall.top1_agreement) == (0.0, 1.0)
    assert overall.loss == found.teacher.overall.loss
    errors = [
        (one.hidden, one.mixer_output, one.teacher_forced, one.replaced_kl) for one in found.layers
    ]
    assert errors == [(0.0, 0.0, 0.0, 0.0)] * 4
    assert [one.router_agreement for one in found.layers] == [None, 1.0, 1.0, 1.0]
    assert [probe.student for probe in found.probes] == [probe.teacher for probe in found.probes]
    assert found.ablated is None


@torch.inference_mode()
def test_layer_replaced_alone_is_the_teacher_with_that_layer(pair, report):
    text = random_text()
    student, teacher = (load_model(folder) for folder in pair)
    expected = log_probs(pair[1], text)
    for layer_idx, found in enumerate(report.layers):
        kept = teacher.layers[layer_idx]
        teacher.layers[layer_idx] = student.layers[layer_idx]
        replaced = teacher(text.tokens[:, :-1]).double().log_softmax(-1)
        teacher.layers[layer_idx] = kept
        kl = (expected.exp() * (expected - replaced)).sum(-1).mean().item()
        assert found.replaced_kl == pytest.approx(kl, abs=FP32)


@torch.inference_mode()
def test_router_agreement_counts_experts_that_both_models_choose(pair, report):
    text = random_text()
    chosen = []
    for folder in pair:
        hidden, experts = load_model(folder).embed(text.tokens[:, :-1]), []
        for layer in load_model(folder).layers:
            with chosen_experts(layer) as found:
                hidden = layer(hidden)
            experts.append(found[0] if found else None)
        chosen.append(experts)
    for found, ours, theirs in zip(report.layers, *chosen, strict=True):
        if ours is None:
            assert found.router_agreement is None
            continue
        pairs = zip(ours.tolist(), theirs.tolist(), strict=True)
        common = sum(len(set(a) & set(b)) for a, b in pairs)
        assert found.router_agreement == common / ours.numel()
        assert 0 < found.router_agreement < 1


@torch.inference_mode()
def test_cosine_and_length_are_those_of_the_two_outputs(pair, report):
    tokens = random_text().tokens[:, :-1]
    ours, theirs = (
        load_model(folder).layers[0].mix(load_model(folder).embed(tokens)).flatten()
        for folder in pair
    )
    cosine = torch.cosine_similarity(ours, theirs, dim=0).item()
    assert report.layers[0].cosine == pytest.approx(cosine, abs=FP32)
    ratio = (ours.norm() / theirs.norm()).item()
    assert report.layers[0].norm_ratio == pytest.approx(ratio, rel=FP32)


@torch.inference_mode()
def test_probes_are_those_of_whole_models(pair, report):
    drawn = probes_of(random_text().tokens, read_config(pair[0]), seed=0)
    assert all((one.probe.tokens > 2).all() for one in drawn)  # 0 to 2 are marks
    assert [(one.name, one.size) for one in report.probes] == [
        ("copying", 64),
        ("induction", 64),
        ("pairs", 16),
    ]
    for found, one in zip(report.probes, drawn, strict=True):
        for folder, share in zip(pair, (found.student, found.teacher), strict=True):
            likeliest = load_model(folder)(one.probe.inputs).argmax(-1)[one.probe.asked]
            expected = (likeliest == one.probe.answers).double().mean().item()
            assert share == pytest.approx(expected)
        assert found.answers == one.probe.asked.sum()


def test_what_runs_beside_the_text_can_be_left_out(pair, report):
    found = measure(*pair, checks=frozenset({Check.QUALITY}))
    assert found.probes == ()
    assert [layer.replaced_kl for layer in found.layers] == [None] * 4
    assert found.student == report.student


def test_mixer_that_is_switched_off_has_an_error_of_1(pair, tmp_path):
    switch_off_mixers(write_hybrid(tmp_path, seed=1))
    found = measure(tmp_path, pair[1])
    assert [(one.mixer_output, one.teacher_forced) for one in found.layers[:3]] == [(1.0, 1.0)] * 3
    assert found.layers[3].teacher_forced > 0


def test_ablation_is_the_student_with_its_mixers_switched_off(pair, report, tmp_path):
    switch_off_mixers(write_hybrid(tmp_path, seed=1))
    expected = measure(tmp_path, pair[1])
    assert report.ablated == expected.student == expected.ablated
    assert report.ablated.overall.kl != report.student.overall.kl


def test_ablation_and_teacher_are_optional(pair, report):
    student, teacher = pair
    without = measure(student, teacher, checks=frozenset(Check) - {Check.ABLATION})
    assert without.ablated is None
    assert without.student == report.student
    alone = measure(student)
    assert (alone.teacher, alone.ablated, alone.layers) == (None, None, ())
    assert alone.student.overall.loss == report.student.overall.loss


def test_batches_do_not_matter(pair, report):
    found = measure(*pair, batch_rows=2)
    assert found.student.overall.loss == pytest.approx(report.student.overall.loss, abs=FP32)
    for one, other in zip(found.layers, report.layers, strict=True):
        assert one.hidden == pytest.approx(other.hidden, rel=1e-4)


def test_converted_layers_are_kda_in_the_student_alone():
    fields = {"linear_attn_config": linear_attn_config(4, [1, 3])}
    half = tiny_config("kimi_linear", **fields)
    assert converted_layers(HYBRID, TEACHER) == {0, 1, 2}
    assert converted_layers(HYBRID, half) == {1}
    assert converted_layers(TEACHER, HYBRID) == frozenset()
    assert converted_layers(HYBRID, None) == frozenset()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_values_that_are_not_finite_name_the_layer_and_whose_they_are(who, pair, tmp_path):
    config = HYBRID if who == "student" else TEACHER
    write_tiny_checkpoint(tmp_path, config)

    def spoil(tensors):
        name = "model.layers.2.post_attention_layernorm.weight"
        if name in tensors:
            tensors[name][0] = math.inf

    edit_tensors(tmp_path, spoil)
    student, teacher = (tmp_path, pair[1]) if who == "student" else (pair[0], tmp_path)
    error = VerificationError if who == "student" else CheckpointError
    with pytest.raises(error, match="after layer 2") as caught:
        measure(student, teacher)
    assert caught.value.where == str(tmp_path)


def test_layers_are_loaded_one_at_a_time(pair, monkeypatch):
    alive, largest = [], 0
    load = LayerLoader.layer

    def counted(loader, layer_idx):
        nonlocal largest
        layer = load(loader, layer_idx)
        alive.append(weakref.ref(layer))
        largest = max(largest, sum(one() is not None for one in alive))
        return layer

    monkeypatch.setattr(LayerLoader, "layer", counted)
    measure(*pair)
    assert len(alive) == 2 * read_config(pair[0]).num_layers
    assert largest == 2


def test_hidden_states_in_files_give_the_same_report(pair, report):
    student, teacher = pair
    found = measure_quality(
        student,
        random_text(),
        teacher=teacher,
        options=ValidationOptions(),
        on_progress=silent,
        on_disk=True,
    )
    assert found == report
