"""What validation found, as data: every number with what it takes to judge and to repeat it.

Nothing is rendered here. In JSON a number that is not finite is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import cast

from kimi_convert.model.dynamics import MixerDynamics
from kimi_convert.model.recall import ProbeResult
from kimi_convert.validation.options import Check, ValidationOptions

FORMAT = 1


class Severity(StrEnum):
    """Whether a finding makes validation fail."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be."""

    severity: Severity
    check: str
    where: str  # a file or a tensor
    message: str
    expected: str = ""
    found: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegrityReport:
    """What was looked at; what is wrong with it is in the report's findings."""

    tensors: int
    nbytes: int  # of all tensors
    values_scanned: int  # tensors searched for NaN and Inf
    hashes_from: tuple[str, ...]  # the files that record hashes
    files_hashed: int
    tensors_hashed: int
    left_out: Mapping[str, str]  # tensors that nothing reads, and why


@dataclass(frozen=True, slots=True)
class FormError:
    """How far one way to compute the logits is from one chunked prefill."""

    form: str
    max_relative_error: float
    rerouted: int  # pairs of token and layer whose own choice of experts differed; not followed
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistencyReport:
    """The same tokens in every form; an error above the bound makes validation fail."""

    tokens: str  # "text" or "random"
    sequences: int
    sequence_length: int
    bound: float  # on max_relative_error
    forms: tuple[FormError, ...]

    @property
    def passed(self) -> bool:
        """Whether every form is within the bound."""
        return all(form.passed for form in self.forms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Means over tokens; the comparisons with a teacher are None without one."""

    tokens: int
    loss: float  # nats per token
    perplexity: float
    kl: float | None = None  # KL(teacher || this model), nats per token
    top1_agreement: float | None = None  # share of tokens


@dataclass(frozen=True, slots=True)
class PositionScores:
    """Scores of the tokens that have `start` to `stop` - 1 tokens before them in their row."""

    start: int
    stop: int
    scores: Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """One model on one text."""

    overall: Scores
    by_kind: Mapping[str, Scores]
    by_position: tuple[PositionScores, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerErrors:
    """How far one student layer is from the teacher's: sum |difference|^2 / sum |teacher|^2."""

    layer_idx: int
    mixer: str  # "kda" or "mla", of the student
    converted: bool  # KDA where the teacher has MLA
    hidden: float  # the hidden state after the layer
    mixer_output: float  # each mixer on its own model's hidden state
    teacher_forced: float  # both mixers on the teacher's hidden state
    cosine: float  # of the angle between both mixers' outputs, each on its own hidden state
    norm_ratio: float  # the length of the student's over the teacher's
    router_agreement: float | None  # share of chosen experts in common; None where dense
    replaced_kl: float | None  # nats per token, with this layer alone in the teacher's place
    dynamics: MixerDynamics | None  # of a KDA layer, on the first sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """Where two greedy continuations of one prompt part."""

    after: int  # tokens that are equal
    gap: float  # nats, between the teacher's own token and the student's, by the teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyAgreement:
    """Greedy continuations of teacher and student, prompt by prompt, up to where they part."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    agreed: float  # share of new tokens before the parting
    partings: tuple[Parting | None, ...]  # None where there is none
    near_tie: float  # nats: a parting with a smaller gap says little

    @property
    def near_ties(self) -> int:
        """How many partings are near ties."""
        return sum(one is not None and one.gap <= self.near_tie for one in self.partings)

    @property
    def whole(self) -> int:
        """How many continuations are equal to their end."""
        return sum(one is None for one in self.partings)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """Numbers without a bound: they never make validation fail."""

    student: ModelScores
    teacher: ModelScores | None
    ablated: ModelScores | None  # the student with the output of converted mixers set to zero
    layers: tuple[LayerErrors, ...]  # empty without a teacher
    probes: tuple[ProbeResult, ...] = ()
    greedy: GreedyAgreement | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSample:
    """The text that was measured on."""

    path: str
    sha256: str  # of the file
    sequences: int
    sequence_length: int
    tokens: int  # predicted
    tokens_by_kind: Mapping[str, int]
    left_over: Mapping[str, int]  # tokens that were read and did not fill a sequence


@dataclass(frozen=True, slots=True)
class NotRun:
    """A check that was not made, and why."""

    check: Check
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What computed the numbers."""

    kimi_convert: str
    python: str
    torch: str
    system: str
    threads: int
    gpus: tuple[str, ...]  # that torch finds, used or not


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """All of it."""

    checkpoint: str
    model_type: str
    teacher: str | None
    integrity: IntegrityReport
    consistency: ConsistencyReport | None
    quality: QualityReport | None
    text: TextSample | None
    findings: tuple[Finding, ...]
    not_run: tuple[NotRun, ...]
    options: ValidationOptions
    environment: Environment
    signed_files: int | None = None  # covered by a signature that holds; None if none was asked

    @property
    def passed(self) -> bool:
        """Whether there is no finding that is an error."""
        return not any(finding.severity is Severity.ERROR for finding in self.findings)

    def to_json(self) -> dict[str, object]:
        """Return the document that `validate --json` prints."""
        body = cast("dict[str, object]", plain(self))
        return {"format": FORMAT, "passed": self.passed, **body}


def plain(value: object) -> object:
    """Return a value as JSON has it; a number that is not finite becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, StrEnum | Path):
        return str(value)
    if isinstance(value, frozenset):
        return sorted(str(item) for item in cast("frozenset[object]", value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in cast("Mapping[object, object]", value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in cast("Sequence[object]", value)]
    return value
