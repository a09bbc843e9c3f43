"""What hybrids can start from and go through: the rows of the quality bench, as recipes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kimi_convert.config.calibration import AlignRecipe, DistillRecipe, InitMethod
from kimi_convert.config.recipe import Recipe, RopeHandling, default_recipe
from kimi_convert.config.target_format import TargetFormat

METHODS = tuple(method for method in InitMethod if method is not InitMethod.COPY)
# Distillation takes minutes a row: what others start from, not what every start has to beat.
DISTILLED = tuple(
    method
    for method in METHODS
    if method not in (InitMethod.ABLATE, InitMethod.MEAN, InitMethod.TOKENWISE)
)


_NO_STEPS = AlignRecipe()
_NONE = DistillRecipe()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What comes after the start, the same for all."""

    align: AlignRecipe = _NO_STEPS
    distill: DistillRecipe = _NONE

    @property
    def undistilled(self) -> Stage:
        """What comes before the distillation."""
        return replace(self, distill=_NONE)

    @property
    def suffix(self) -> str:
        """How a row's name tells it."""
        aligned = f" + {self.align.steps} steps" if self.align.steps else ""
        tokens = self.distill.tokens
        return aligned + (f" + {tokens / 1e6:g}M tokens" if tokens else "")


def stages(align: Sequence[AlignRecipe], distill: DistillRecipe) -> list[Stage]:
    """Return no training, every alignment, and the last alignment followed by distillation."""
    found = [Stage(align=recipe) for recipe in (_NO_STEPS, *align)]
    if distill.tokens:
        found.append(Stage(align=align[-1] if align else _NO_STEPS, distill=distill))
    return found


def starts(all_stages: Sequence[Stage]) -> Iterator[tuple[str, Recipe]]:
    """Yield every start by name, at equal tokens and, but for the choice of layers, equal stages."""
    yield "copied, no text", Recipe()
    released = replace(default_recipe(), choose_layers=False)
    for stage in all_stages:
        for method in DISTILLED if stage.distill.tokens else METHODS:
            yield f"{method}{stage.suffix}", _with(released, method, stage)
        if not stage.distill.tokens:
            dropped = replace(released, rope=RopeHandling.DROP)
            yield f"search, rope dropped{stage.suffix}", _with(dropped, InitMethod.SEARCH, stage)
        for method in (InitMethod.NAIVE, InitMethod.SEARCH):
            yield f"{method}, layers chosen{stage.suffix}", _with(default_recipe(), method, stage)
        rotated = replace(default_recipe(), output_format=TargetFormat.BAILING_HYBRID)
        yield (
            f"search, {rotated.output_format}{stage.suffix}",
            _with(rotated, InitMethod.SEARCH, stage),
        )


def _with(recipe: Recipe, method: InitMethod, stage: Stage) -> Recipe:
    assert recipe.calibration is not None
    fitted = replace(recipe.calibration, method=method, align=stage.align, distill=stage.distill)
    return replace(recipe, calibration=fitted)
