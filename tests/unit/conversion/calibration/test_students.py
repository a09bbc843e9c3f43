"""Students: rounded as they will be stored, kept layers without rotation."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.calibration.fold import fold_query
from kimi_convert.conversion.calibration.gate import strongest_directions
from kimi_convert.conversion.calibration.mixer import to_parameters
from kimi_convert.conversion.calibration.moves import starting_point
from kimi_convert.conversion.calibration.students import (
    KdaStudent,
    MlaStudent,
    kept_parameters,
)
from kimi_convert.conversion.target import target_config
from tests.tiny import tiny_config
from tests.unit.conversion.calibration.teachers import TYPES, inputs, mla_layer, statistics


def kda_student(tmp_path, dtype):
    layer = statistics(tmp_path, TYPES["full-q"], inputs())
    config = target_config(tiny_config("deepseek_v3", dtype=dtype), Recipe())
    weights = starting_point(layer, conv_size=4)
    directions = strongest_directions(layer, num=16)
    made = to_parameters(weights, torch.zeros(64, 32), directions)
    return KdaStudent(config, made), made


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_what_the_file_will_hold(tmp_path, dtype):
    student, made = kda_student(tmp_path, dtype)
    stored = getattr(torch, dtype)
    for name, value in student.parameters().items():
        expected = made[name].float()
        if name not in ("kda.A_log", "kda.dt_bias"):
            expected = expected.to(stored).float()
        assert torch.equal(value, expected), name


def test_output_matrix_is_no_part_of_a_student(tmp_path):
    student, _ = kda_student(tmp_path, "float32")
    assert "kda.o.weight" not in student.parameters()
    assert student.features(inputs()).shape == (4, 40, 64)


@pytest.mark.parametrize("kind", ["full-q", "low-rank-q", "yarn"])
@pytest.mark.parametrize("folded", [True, False], ids=["fold", "drop"])
def test_kept_layer_changes_its_query_alone(tmp_path, kind, folded):
    teacher = mla_layer(tmp_path, TYPES[kind])
    config = target_config(TYPES[kind], Recipe())
    sizes = teacher.sizes
    lags = torch.rand(sizes.num_heads, 5)
    student = MlaStudent(config, kept_parameters(config, teacher, lags if folded else None))
    name = "mla.q.weight" if sizes.q_lora_rank is None else "mla.q_b.weight"
    query = student.parameters()[name]
    before = teacher.q.weight if sizes.q_lora_rank is None else teacher.q_b.weight
    expected = fold_query(before, lags, sizes)
    if not folded:
        expected = fold_query(before, lags.new_ones(sizes.num_heads, 1), sizes)
        expected.view(sizes.num_heads, sizes.qk_head_dim, -1)[:, sizes.qk_nope_head_dim :] = 0
    torch.testing.assert_close(query, expected)
    for other, value in teacher.named_parameters():
        if other != "o.weight" and f"mla.{other}" != name:
            assert torch.equal(dict(student.module.named_parameters())[other], value)
    assert student.module.sizes.rope is None


def test_fitted_parameters_are_taken_over(tmp_path):
    teacher = mla_layer(tmp_path, TYPES["full-q"])
    config = target_config(TYPES["full-q"], Recipe())
    kept = kept_parameters(config, teacher, None)
    fitted = {name: torch.randn_like(value) for name, value in kept.items()}
    student = MlaStudent(config, fitted)
    assert student.parameters().keys() == fitted.keys()
    for name, value in student.parameters().items():
        assert torch.equal(value, fitted[name])
