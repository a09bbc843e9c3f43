"""One layer of a small teacher, and the student that a start without a search makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.calibration.fixed_start import LayerGiven
from kimi_convert.conversion.calibration.ridge import fit_ridge, moments
from kimi_convert.conversion.calibration.starts import fixed_parameters
from kimi_convert.conversion.calibration.statistics import layer_statistics
from kimi_convert.conversion.calibration.students import KdaStudent
from kimi_convert.conversion.target import target_config
from tests.tiny import tiny_config
from tests.unit.conversion.calibration.teachers import inputs, mla_layer

CONFIG = tiny_config("deepseek_v3")


@dataclass
class Planted:
    """A layer, what it is given, and what it gives."""

    teacher: object
    given: LayerGiven

    def student(self, method):
        parameters = fixed_parameters(self.given, method)
        return KdaStudent(target_config(CONFIG, Recipe()), {**parameters, "kda.o.weight": None})

    def fitted(self, student, y=None):
        """The student's outputs with its output matrix solved."""
        z = student.features(self.given.x)
        y = self.given.y if y is None else y
        fit = fit_ridge([moments(z[n], y[n]) for n in range(len(z))])
        return z @ fit.solution


def planted(tmp_path):
    teacher = mla_layer(tmp_path, CONFIG)
    x = inputs(rows=8, length=48)
    given = LayerGiven(
        layer=layer_statistics(teacher, x),
        x=x,
        y=teacher(x),
        kda=target_config(CONFIG, Recipe()).kda,
        rms_norm_eps=1e-5,
        generator=torch.Generator().manual_seed(0),
    )
    return Planted(teacher, given)
