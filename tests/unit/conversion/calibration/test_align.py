"""Gradient steps on one mixer: what they reach, and how they end when they fail."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.config.calibration import AlignRecipe
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.calibration import peers
from kimi_convert.conversion.calibration.align import align_mixer
from kimi_convert.conversion.calibration.students import KdaStudent
from kimi_convert.conversion.target import target_config
from kimi_convert.errors import VerificationError
from tests.unit.conversion.calibration.fixed import CONFIG, planted


@pytest.fixture
def layer(tmp_path):
    return planted(tmp_path)


@pytest.fixture
def student(layer):
    return layer.student(peers.kil)


def matrix():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(64, 32, generator=generator) / 8


def align(student, x, y, **changes):
    recipe = AlignRecipe(**{"steps": 40, "tokens_per_step": 192, **changes})
    with torch.no_grad():
        return align_mixer(student, matrix(), x, y, recipe, seed=0)


def values_of(student):
    return {name: value.clone() for name, value in student.parameters().items()}


def test_loss_falls_and_tokens_are_counted(layer, student):
    note = align(student, layer.given.x, layer.given.y)
    assert note.losses[1] < 0.8 * note.losses[0]
    assert note.tokens == 40 * 4 * 48


def test_loss_does_not_depend_on_the_scale_of_the_layer(layer):
    losses = []
    for scale in (1.0, 1000.0):
        layer.given.generator.manual_seed(0)
        student = layer.student(peers.kil)
        recipe = AlignRecipe(steps=12, tokens_per_step=192)
        found = align_mixer(
            student,
            scale * matrix(),
            layer.given.x,
            scale * layer.given.y,
            recipe,
            seed=0,
        )
        losses.append(found.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_ends_it_and_changes_nothing(layer, student, value):
    before = values_of(student)
    y = layer.given.y.clone()
    y[:, 5] = value
    with pytest.raises(VerificationError, match="alignment diverges") as caught:
        align(student, layer.given.x, y)
    assert caught.value.exit_code == 6
    assert all(torch.equal(before[name], value) for name, value in student.parameters().items())


def test_loss_that_grows_ends_it_and_changes_nothing(layer, student):
    x = layer.given.x
    nearly = student.features(x) @ matrix()  # what the mixer gives already, but for a little
    y = nearly + 0.01 * torch.randn_like(nearly)
    before = values_of(student)
    with pytest.raises(VerificationError, match="alignment diverges"):
        align(student, x, y, learning_rate=1.0)
    assert all(torch.equal(before[name], value) for name, value in student.parameters().items())


def test_mixer_that_is_on_its_target_is_left_alone(layer, student):
    before = values_of(student)
    x = layer.given.x
    note = align(student, x, student.features(x) @ matrix())
    assert note.tokens == 0
    assert all(torch.equal(before[name], value) for name, value in student.parameters().items())


def test_mixer_that_steps_only_lead_away_stays_as_it_was(layer, student):
    before = values_of(student)
    x = layer.given.x
    nearly = student.features(x) @ matrix()
    y = nearly + 1e-2 * nearly.std() * torch.randn_like(nearly)
    note = align(student, x, y, learning_rate=3e-2)
    assert note.losses[0] == note.losses[1] == pytest.approx(1e-4, rel=0.2)
    assert note.tokens == 40 * 4 * 48
    assert all(torch.equal(before[name], value) for name, value in student.parameters().items())


@pytest.mark.gpu
def test_on_a_gpu_replayed_steps_reach_what_they_reach_on_a_cpu(layer, student):
    stored = {name: value.cuda() for name, value in student.parameters().items()}
    elsewhere = KdaStudent(target_config(CONFIG, Recipe()), {**stored, "kda.o.weight": None})
    x, y = layer.given.x, layer.given.y
    recipe = AlignRecipe(steps=40, tokens_per_step=192)
    with torch.no_grad():
        expected = align_mixer(student, matrix(), x, y, recipe, seed=0)
        found = align_mixer(elsewhere, matrix().cuda(), x.cuda(), y.cuda(), recipe, seed=0)
    assert found.tokens == expected.tokens
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)
