"""The recipe of a conversion: which layers stay, and what the new ones start from. TOML or defaults.

[init]
method = "search"            # or "copy", which needs no text; [kda] is for "copy" alone
[calibration]
tokens = 65536
[align]
steps = 0
[layers]
keep = "auto"                # by measurement; "released": every 4th and the last; or a list from 0
[mla]
rope = "fold"                # what becomes of the rotated part of layers that stay
[output]
format = "kimi_linear"       # or "bailing_hybrid", where layers that stay keep their rotation
[kda]
short_conv_size = 4
qk_rms = 8.0
v_rms = 0.3
half_life_tokens = [0.3, 10.0]
output_scale = 0.4
seed = 0
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from kimi_convert.config.calibration import CalibrationRecipe, read_calibration
from kimi_convert.config.fields import Fields
from kimi_convert.config.limits import MAX_LAYERS, shown
from kimi_convert.config.target_format import TargetFormat, output_format
from kimi_convert.errors import ConfigError, RecipeError

_MAX_RECIPE_BYTES = 1024 * 1024
_RELEASED, _AUTO = "released", "auto"
_RELEASED_PERIOD = 4
_NEEDS_TEXT = 'what needs no text, or another method than "copy" under [init]'


class RopeHandling(StrEnum):
    """What becomes of RoPE in MLA layers that stay; Kimi-Linear rotates nothing."""

    DROP = "drop"  # the rotated part of every query becomes 0
    FOLD = "fold"  # each head's rotation, averaged over where it looks, moves into its query


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Every choice of a conversion.

    `Recipe()` is a conversion without text, `default_recipe()` what the command line does. The
    defaults of the KDA fields were chosen on `examples/text/calibration.jsonl` with the bundled
    checkpoint; docs/adr/0006-data-free-start.md has the measurements.
    """

    keep_layers: tuple[int, ...] | None = None  # stay MLA, from 0; None: the released pattern
    choose_layers: bool = False  # by measurement, as many as the released pattern keeps
    calibration: CalibrationRecipe | None = None  # None: nothing is fitted
    rope: RopeHandling = RopeHandling.DROP
    short_conv_size: int = 4
    qk_rms: float = 8.0  # of q and k before SiLU; above 1, SiLU makes them mostly positive
    v_rms: float = 0.3  # of v before SiLU; below 1, SiLU stays close to linear
    half_life_tokens: tuple[float, float] = (0.3, 10.0)  # shortest and longest key channel
    output_scale: float = 0.4  # of a mixer's output against the teacher's values
    output_format: TargetFormat = TargetFormat.KIMI_LINEAR
    seed: int = 0  # of the down-projections of the gates, which start without effect

    def __post_init__(self) -> None:
        """Refuse numbers that no weight can be made from, and lists that name no layers."""
        if self.keep_layers is not None:
            _require(
                tuple(sorted(set(self.keep_layers))) == self.keep_layers,
                "layers.keep",
                "each layer once, in order",
                self.keep_layers,
            )
            outside = [layer for layer in self.keep_layers if not 0 <= layer < MAX_LAYERS]
            _require(not outside, "layers.keep", "layers counted from 0", outside)
        fitted = self.calibration is not None
        _require(fitted or not self.choose_layers, "layers.keep", _NEEDS_TEXT, _AUTO)
        _require(fitted or self.rope == RopeHandling.DROP, "mla.rope", _NEEDS_TEXT, self.rope)
        _require(
            not self.choose_layers or self.keep_layers is None,
            "layers.keep",
            "a list or a choice",
            self.keep_layers,
        )
        positive = {
            "kda.short_conv_size": self.short_conv_size,
            "kda.qk_rms": self.qk_rms,
            "kda.v_rms": self.v_rms,
            "kda.output_scale": self.output_scale,
        }
        for name, value in positive.items():
            _require(0 < value <= 1e4, name, "above 0 and at most 10000", value)
        _require(
            self.short_conv_size <= 16, "kda.short_conv_size", "at most 16", self.short_conv_size
        )
        shortest, longest = self.half_life_tokens
        _require(
            1e-2 <= shortest <= longest <= 1e7,
            "kda.half_life_tokens",
            "two numbers from 0.01 to 10000000, the shorter first",
            self.half_life_tokens,
        )
        _require(0 <= self.seed < 2**31, "kda.seed", "0 to 2147483647", self.seed)

    def kept_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers that stay MLA in a model of `num_layers` layers, from 0.

        Raises:
            RecipeError: the list names a layer that the model does not have, or keeps all.
        """
        if self.keep_layers is None:
            fourth = range(_RELEASED_PERIOD - 1, num_layers, _RELEASED_PERIOD)
            return tuple(sorted({*fourth, num_layers - 1}))
        outside = [layer for layer in self.keep_layers if not 0 <= layer < num_layers]
        _require(not outside, "layers.keep", f"layers from 0 to {num_layers - 1}", outside)
        _require(
            len(self.keep_layers) < num_layers,
            "layers.keep",
            "at least one layer to convert",
            "all layers kept",
        )
        return self.keep_layers

    def to_json(self) -> dict[str, object]:
        """Return every field, defaults included."""
        document = asdict(self)
        del document["choose_layers"], document["calibration"]
        if self.calibration is not None:
            document |= self.calibration.to_json()
        document["keep_layers"] = self._keep_text()
        document["output_format"] = str(self.output_format)
        document["half_life_tokens"] = list(self.half_life_tokens)
        return document

    def _keep_text(self) -> object:
        if self.choose_layers:
            return _AUTO
        return _RELEASED if self.keep_layers is None else list(self.keep_layers)


def default_recipe() -> Recipe:
    """Return what a conversion does where nothing else is asked for: fitted, layers by measurement."""
    return Recipe(choose_layers=True, calibration=CalibrationRecipe(), rope=RopeHandling.FOLD)


def with_layers(recipe: Recipe, text: str) -> Recipe:
    """Return the recipe with layers as the command line names them: auto, released, or "3,7".

    Raises:
        RecipeError: the text is none of them, or the choice needs a calibration.
    """
    if text in (_AUTO, _RELEASED, "uniform"):
        return replace(recipe, keep_layers=None, choose_layers=text == _AUTO)
    fields = [field.strip() for field in text.split(",")]
    expected = f"{_AUTO}, {_RELEASED}, or layers counted from 0 as 3,7"
    _require(
        all(field.isascii() and field.isdigit() for field in fields), "layers.keep", expected, text
    )
    listed = sorted({int(field[:9]) for field in fields})
    return replace(recipe, keep_layers=tuple(listed), choose_layers=False)


def with_training(
    recipe: Recipe, *, align_steps: int | None = None, distill_tokens: int | None = None
) -> Recipe:
    """Return the recipe with other amounts of training; None leaves one as it is.

    Args:
        recipe: any.
        align_steps: gradient steps on each mixer.
        distill_tokens: tokens of training all mixers together.

    Raises:
        RecipeError: the recipe fits nothing to text, or a number is out of range.
    """
    fitted = recipe.calibration
    for name, amount in (("align.steps", align_steps), ("distill.tokens", distill_tokens)):
        _require(fitted is not None or not amount, name, "0 without a calibration", amount)
    if fitted is None:
        return recipe
    if align_steps is not None:
        fitted = replace(fitted, align=replace(fitted.align, steps=align_steps))
    if distill_tokens is not None:
        fitted = replace(fitted, distill=replace(fitted.distill, tokens=distill_tokens))
    return replace(recipe, calibration=fitted)


def without_text(recipe: Recipe) -> Recipe:
    """Return the recipe as one that fits nothing: a data-free start in the released pattern."""
    return replace(recipe, calibration=None, choose_layers=False, rope=RopeHandling.DROP)


def load_recipe(path: Path | None) -> Recipe:
    """Read a recipe file; None gives the defaults.

    Raises:
        RecipeError: the file is missing, is not TOML, or has an unknown or wrong field.
    """
    if path is None:
        return default_recipe()
    document = _read_toml(path)
    try:
        return _parse(document, path)
    except ConfigError as error:
        raise RecipeError(
            error.message.replace("config field", "recipe field", 1),
            where=path,
            expected=error.expected,
            found=error.found,
            hint=error.hint,
        ) from error
    except RecipeError as error:
        error.where = str(path)
        raise


def _read_toml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_RECIPE_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError("recipe file is missing", where=path) from error
    except OSError as error:
        raise RecipeError(
            "recipe file cannot be read", where=path, found=error.strerror
        ) from error
    if len(data) > _MAX_RECIPE_BYTES:
        raise RecipeError("recipe file is too large", where=path, expected="at most 1 MiB")
    try:
        return tomllib.loads(data.decode("utf-8"))
    # ValueError is broken TOML, with its line and column, broken UTF-8, or a number too long.
    except (ValueError, RecursionError) as error:
        raise RecipeError("recipe file is not readable TOML", where=path, found=error) from error


def _parse(document: Mapping[str, object], path: Path) -> Recipe:
    defaults = Recipe()
    top = Fields(document, where=path)
    names = ("init", "calibration", "align", "distill", "layers", "mla", "output", "kda")
    init, calibration, align, distill, layers, mla, output, kda = (
        top.nested(name) or top.inside(name, {}) for name in names
    )
    fitted = read_calibration(init, calibration, align, distill)
    rope = RopeHandling.DROP if fitted is None else RopeHandling.FOLD
    keep = layers.raw("keep")
    values = Recipe(
        keep_layers=_keep_layers(layers),
        choose_layers=keep == _AUTO or (keep is None and fitted is not None),
        calibration=fitted,
        rope=_rope(mla.text("rope", default=rope)),
        short_conv_size=kda.integer("short_conv_size", default=defaults.short_conv_size),
        qk_rms=kda.number("qk_rms", default=defaults.qk_rms),
        v_rms=kda.number("v_rms", default=defaults.v_rms),
        half_life_tokens=_half_lives(kda) or defaults.half_life_tokens,
        output_format=output_format(output.text("format", default=defaults.output_format)),
        output_scale=kda.number("output_scale", default=defaults.output_scale),
        seed=kda.integer("seed", default=defaults.seed),
    )
    for section in (top, init, calibration, align, distill, layers, mla, output, kda):
        section.refuse_rest()
    return values


def _keep_layers(layers: Fields) -> tuple[int, ...] | None:
    stated = layers.raw("keep")
    if stated in (None, _RELEASED, _AUTO):
        return None
    expected = f"{_AUTO!r}, {_RELEASED!r} or a list"
    _require(isinstance(stated, list), "layers.keep", expected, stated)
    listed = layers.integer_list("keep")
    _require(len(set(listed)) == len(listed), "layers.keep", "each layer once", listed)
    return tuple(sorted(listed))


def _rope(text: str) -> RopeHandling:
    _require(text in {*RopeHandling}, "mla.rope", " or ".join(RopeHandling), text)
    return RopeHandling(text)


def _half_lives(kda: Fields) -> tuple[float, float] | None:
    pair = kda.numbers("half_life_tokens")
    if pair is None:
        return None
    _require(len(pair) == 2, "kda.half_life_tokens", "two numbers", pair)
    return pair[0], pair[1]


def _require(holds: bool, field_name: str, expected: object, found: object) -> None:
    if not holds:
        raise RecipeError(
            f"recipe field {field_name!r} is not valid", expected=expected, found=shown(found)
        )
