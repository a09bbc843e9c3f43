"""Half-lives and write strengths of planted mixers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kimi_convert.config.recipe import Recipe
from kimi_convert.config.target_format import TargetFormat
from kimi_convert.conversion.calibration import peers
from kimi_convert.conversion.calibration.dynamics import dynamics_of
from kimi_convert.conversion.calibration.fixed_start import FixedStart
from kimi_convert.conversion.calibration.starts import fixed_parameters
from kimi_convert.conversion.calibration.students import (
    KdaStudent,
    MlaStudent,
    kept_parameters,
)
from kimi_convert.conversion.target import target_config
from tests.unit.conversion.calibration.fixed import CONFIG, planted


@pytest.mark.parametrize("form", TargetFormat)
def test_planted_half_lives_and_strengths_are_told(tmp_path, form):
    layer = planted(tmp_path)
    config = target_config(CONFIG, Recipe(output_format=form))
    half_lives = torch.tensor([1.0, 10.0, 100.0, 1000.0])

    def known(given):
        weights = peers.kil(given).weights
        rates = (0.6931472 / half_lives)[:, None].expand_as(weights.rates)
        return FixedStart(weights=replace(weights, rates=rates, beta=0 * weights.beta))

    parameters = fixed_parameters(replace(layer.given, kda=config.kda), known)
    found = dynamics_of(KdaStudent(config, parameters), layer.given.x)
    expected = half_lives[:, None].expand(-1, 3)
    torch.testing.assert_close(torch.tensor(found["half_lives"]), expected, rtol=1e-3, atol=0)
    assert found["beta"] == (0.5,) * 4


def test_norm_gives_way_to_its_eps_where_outputs_are_small(tmp_path):
    layer = planted(tmp_path)
    parameters = dict(fixed_parameters(layer.given, peers.kil))
    value_dim = CONFIG.mla.v_head_dim
    # Head 1 writes almost nothing; SiLU of a small value is half of it.
    parameters["kda.v.weight"][value_dim : 2 * value_dim] *= 1e-6
    config = target_config(CONFIG, Recipe())
    found = dynamics_of(KdaStudent(config, parameters), layer.given.x)
    assert found["eps_share"][1] == 1.0
    assert max(found["eps_share"][n] for n in (0, 2, 3)) < 0.5


def test_attention_has_no_half_life(tmp_path):
    layer = planted(tmp_path)
    config = target_config(CONFIG, Recipe())
    student = MlaStudent(config, kept_parameters(config, layer.teacher, None))
    assert dynamics_of(student, layer.given.x) == {}
