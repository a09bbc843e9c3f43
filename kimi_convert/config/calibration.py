"""How a conversion is fitted to text: `[init]`, `[calibration]`, `[align]`, `[distill]` of a recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

from kimi_convert.config.fields import Fields
from kimi_convert.config.limits import shown
from kimi_convert.errors import RecipeError


class InitMethod(StrEnum):
    """What the new mixers start from."""

    COPY = "copy"  # the teacher's projections and fixed dynamics; needs no text
    SEARCH = "search"  # every head's basis, gains, decay and write strength by measurement
    # What others do, on the same tokens and through the same later stages.
    NAIVE = "naive"  # copied projections, random dynamics
    KIL = "kil"  # copied projections, one constant decay
    RANDOM = "random"
    TAYLOR = "taylor"  # copied projections, half-lives by mean distance, a damped gate
    PRIMING = "priming"  # copied projections, random dynamics, a gate from W_O and W_V
    # What a mixer has to beat.
    ABLATE = "ablate"  # no output
    MEAN = "mean"  # the mean output for every token
    TOKENWISE = "tokenwise"  # the best map of single tokens


class DistilledParameters(StrEnum):
    """What a distillation trains."""

    MIXERS = "mixers"
    ALL = "all"  # but a router's correction bias, which no gradient reaches


def _require(holds: bool, field_name: str, expected: object, found: object) -> None:
    if not holds:
        raise RecipeError(
            f"recipe field {field_name!r} is not valid", expected=expected, found=shown(found)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignRecipe:
    """Gradient steps on one mixer at a time; none by default."""

    steps: int = 0
    tokens_per_step: int = 512
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        """Refuse numbers that no training can use."""
        _require(0 <= self.steps <= 100_000, "align.steps", "0 to 100000", self.steps)
        _require(
            1 <= self.tokens_per_step <= 2**24,
            "align.tokens_per_step",
            "1 to 16777216",
            self.tokens_per_step,
        )
        _require(0 < self.learning_rate <= 1, "align.learning_rate", "0 to 1", self.learning_rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillRecipe:
    """Gradient steps on all mixers together, towards the teacher's predictions; none by default."""

    tokens: int = 0
    parameters: DistilledParameters = DistilledParameters.MIXERS
    tokens_per_step: int = 8192
    learning_rate: float = 1e-3
    written_tokens: int = 0  # that the teacher writes, and that are drawn from beside the text

    def __post_init__(self) -> None:
        """Refuse numbers that no training can use."""
        for name in ("tokens", "written_tokens"):
            amount = getattr(self, name)
            _require(0 <= amount <= 2**40, f"distill.{name}", "0 to 2^40", amount)
        _require(
            1 <= self.tokens_per_step <= 2**24,
            "distill.tokens_per_step",
            "1 to 16777216",
            self.tokens_per_step,
        )
        _require(
            0 < self.learning_rate <= 1, "distill.learning_rate", "0 to 1", self.learning_rate
        )

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.tokens_per_step

    @property
    def trains_all(self) -> bool:
        """Whether there are steps that move more than mixers."""
        return self.steps > 0 and self.parameters is DistilledParameters.ALL


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecipe:
    """What is measured, on how much text."""

    method: InitMethod = InitMethod.SEARCH
    tokens: int = 131_072  # in all
    sequence_length: int = 512
    search_tokens: int = 10_240  # that the search of a mixer looks at
    validation_tokens: int = 8_192  # that fit nothing: they choose layers and are reported
    align: AlignRecipe = AlignRecipe()
    distill: DistillRecipe = DistillRecipe()

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to fit or to check with."""
        _require(self.method is not InitMethod.COPY, "init.method", "a fitted start", self.method)
        _require(
            16 <= self.sequence_length <= 2**20,
            "calibration.sequence_length",
            "16 to 1048576",
            self.sequence_length,
        )
        _require(self.tokens <= 2**34, "calibration.tokens", "at most 17179869184", self.tokens)
        # Two rows to search with, two to check with, and five to solve with: each of the solves
        # leaves a row out.
        least = {"search_tokens": 2, "validation_tokens": 2}
        for name, rows in least.items():
            tokens = getattr(self, name)
            _require(
                tokens >= rows * self.sequence_length,
                f"calibration.{name}",
                f"at least {rows} sequences of {self.sequence_length} tokens",
                tokens,
            )
        needed = self.validation_tokens + max(self.search_tokens, 5 * self.sequence_length)
        _require(
            self.tokens >= needed,
            "calibration.tokens",
            f"at least {needed}: validation_tokens, and search_tokens or five sequences",
            self.tokens,
        )

    @property
    def rows(self) -> int:
        """Sequences in all."""
        return self.tokens // self.sequence_length

    @property
    def search_rows(self) -> int:
        """Sequences that the search looks at: the first of those that fit."""
        return self.search_tokens // self.sequence_length

    @property
    def validation_rows(self) -> int:
        """Sequences that fit nothing: the last."""
        return self.validation_tokens // self.sequence_length

    @property
    def trains(self) -> bool:
        """Whether there are gradient steps, which move all parameters of a mixer."""
        return self.align.steps > 0 or self.distill.steps > 0

    def to_json(self) -> dict[str, object]:
        """Return every field, as a recipe groups them."""
        document = asdict(self)
        later = {name: document.pop(name) for name in ("align", "distill")}
        method = document.pop("method")
        return {"init": {"method": str(method)}, "calibration": document, **later}


def read_calibration(
    init: Fields, calibration: Fields, align: Fields, distill: Fields
) -> CalibrationRecipe | None:
    """Read the four parts; None where the method needs no text.

    Raises:
        ConfigError: a field has a wrong type.
        RecipeError: a value cannot be used, or is given for a method that does not use it.
    """
    method = _method(init.text("method", default=InitMethod.SEARCH))
    if method is InitMethod.COPY:
        return None
    defaults, steps, whole = CalibrationRecipe(), AlignRecipe(), DistillRecipe()
    return CalibrationRecipe(
        method=method,
        tokens=calibration.integer("tokens", default=defaults.tokens),
        sequence_length=calibration.integer("sequence_length", default=defaults.sequence_length),
        search_tokens=calibration.integer("search_tokens", default=defaults.search_tokens),
        validation_tokens=calibration.integer(
            "validation_tokens", default=defaults.validation_tokens
        ),
        align=AlignRecipe(
            steps=align.integer("steps", default=steps.steps),
            tokens_per_step=align.integer("tokens_per_step", default=steps.tokens_per_step),
            learning_rate=align.number("learning_rate", default=steps.learning_rate),
        ),
        distill=DistillRecipe(
            tokens=distill.integer("tokens", default=whole.tokens),
            parameters=_parameters(distill.text("parameters", default=whole.parameters)),
            tokens_per_step=distill.integer("tokens_per_step", default=whole.tokens_per_step),
            learning_rate=distill.number("learning_rate", default=whole.learning_rate),
            written_tokens=distill.integer("written_tokens", default=whole.written_tokens),
        ),
    )


def _parameters(text: str) -> DistilledParameters:
    _require(
        text in {*DistilledParameters},
        "distill.parameters",
        " or ".join(DistilledParameters),
        text,
    )
    return DistilledParameters(text)


def _method(text: str) -> InitMethod:
    _require(text in {*InitMethod}, "init.method", " or ".join(InitMethod), text)
    return InitMethod(text)
