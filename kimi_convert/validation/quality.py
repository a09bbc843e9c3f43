"""How well a checkpoint predicts a text, and how far it is from the model it was made from.

Teacher and student run side by side, one layer at a time, the hidden states of all tokens
carried: memory holds one layer of each and, per stream, tokens x width, or a file does where that
is too much. Nothing here is a verdict; the numbers have no bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.dynamics import MixerDynamics, mixer_dynamics
from kimi_convert.model.loading import LayerLoader, open_layers
from kimi_convert.model.recall import probes_of
from kimi_convert.model.router_agreement import chosen_experts
from kimi_convert.model.text import PackedText
from kimi_convert.validation.activations import Activations, batches
from kimi_convert.validation.layer_sums import LayerSums
from kimi_convert.validation.options import Check, ValidationOptions
from kimi_convert.validation.probe_streams import ProbeStreams
from kimi_convert.validation.replacement import TOKENS as REPLACED_TOKENS
from kimi_convert.validation.replacement import Replacements
from kimi_convert.validation.report import LayerErrors, ModelScores, QualityReport
from kimi_convert.validation.scores import Stream, score_tokens, summarise
from kimi_convert.validation.text_streams import TextStreams, converted_layers, embed_text


@dataclass(frozen=True, slots=True)
class _Beside:
    """What runs beside the text, each through the layers that are loaded for it."""

    probes: ProbeStreams
    replaced: Replacements | None

    def advance(
        self, student: DecoderLayer, teacher: DecoderLayer | None, guide: Activations | None
    ) -> None:
        """Take everything through one layer; `guide` is the teacher's hidden state before it."""
        self.probes.advance(student, teacher)
        if self.replaced is not None and teacher is not None and guide is not None:
            self.replaced.advance(student, teacher, guide.rows(slice(self.replaced.rows)))


@torch.inference_mode()
def measure_quality(
    checkpoint: Path,
    text: PackedText,
    *,
    teacher: Path | None,
    options: ValidationOptions,
    on_progress: ProgressCallback,
    on_disk: bool | None = None,
) -> QualityReport:
    """Measure losses, and with a teacher also divergences and the errors of every layer.

    Args:
        checkpoint: the folder.
        text: what is measured on.
        teacher: what it was made from, if it is compared.
        options: of the validation.
        on_progress: told of every layer.
        on_disk: whether hidden states are kept in a file; None where memory is too small for them.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the teacher's values are not finite.
        VerificationError: the student's values are not finite.
        ResourceError: hidden states fit neither into memory nor on the disk.
    """
    with ExitStack() as stack:
        student = stack.enter_context(_open(checkpoint, options))
        guide = stack.enter_context(_open(teacher, options)) if teacher else None
        converted = converted_layers(student.config, guide.config if guide else None)
        streams = embed_text(student, guide, text.tokens[:, :-1], options, on_disk=on_disk)
        beside = _beside(student, guide, text, options)
        sums: list[LayerSums] = []
        num_layers = student.config.num_layers
        for layer_idx in range(num_layers):
            on_progress(ProgressEvent("running layers", layer_idx, num_layers, "layers"))
            found = _run_layer(
                student.layer(layer_idx),
                guide.layer(layer_idx) if guide else None,
                streams,
                beside,
                switched_off=layer_idx in converted,
                batch_rows=options.batch_rows,
            )
            streams.require_finite(checkpoint, teacher, layer_idx)
            sums.append(found)
        on_progress(ProgressEvent("running layers", num_layers, num_layers, "layers"))
        scores = _score(student, guide, streams, text, on_progress)
        layers = _layer_errors(student, guide, streams, beside, sums)
        probes = tuple(beside.probes.results(student.head(), guide.head() if guide else None))
    return QualityReport(
        student=scores["student"],
        teacher=scores.get("teacher"),
        ablated=scores.get("ablated"),
        layers=layers,
        probes=probes,
    )


def _open(folder: Path, options: ValidationOptions) -> AbstractContextManager[LayerLoader]:
    return open_layers(
        folder,
        dtype=options.torch_dtype,
        device=options.device,
        numerics=options.numerics,
        backend=options.backend,
    )


def _beside(
    student: LayerLoader, teacher: LayerLoader | None, text: PackedText, options: ValidationOptions
) -> _Beside:
    """Start the probes with ids of the text that are no marks, and the replaced streams."""
    rows = len(text.tokens)
    wanted = Check.PROBES in options.checks
    drawn = probes_of(text.tokens, student.config, seed=options.seed) if wanted else ()
    probes = ProbeStreams(drawn, options.batch_rows)
    of_teacher = teacher.embedding() if teacher else None
    probes.embed(student.embedding(), of_teacher, torch.device(options.device))
    if teacher is None or Check.REPLACEMENT not in options.checks:
        return _Beside(probes, None)
    rows = max(1, min(rows, REPLACED_TOKENS // (text.tokens.shape[1] - 1)))
    return _Beside(probes, Replacements(rows))


def _run_layer(
    student: DecoderLayer,
    teacher: DecoderLayer | None,
    streams: TextStreams,
    beside: _Beside,
    *,
    switched_off: bool,
    batch_rows: int,
) -> LayerSums:
    """Advance every stream by one layer, in place, a batch of sequences at a time."""
    sums = LayerSums(dynamics=_dynamics(student, streams.student.rows(slice(batch_rows))))
    beside.advance(student, teacher, streams.teacher)
    for rows in batches(len(streams.student), batch_rows):
        before = streams.student.rows(rows)
        mixed = student.mix(before)
        with chosen_experts(student) as chosen:
            after = _finish(student, before, mixed)
        if teacher is not None:
            assert streams.teacher is not None
            guide = streams.teacher.rows(rows)
            expected = teacher.mix(guide)
            sums.mixer_output.add(mixed, expected)
            sums.alignment.add(mixed, expected)
            sums.teacher_forced.add(student.mix(guide), expected)
            with chosen_experts(teacher) as expected_experts:
                expected_after = _finish(teacher, guide, expected)
            streams.teacher.replace(rows, expected_after)
            sums.routing.add(chosen, expected_experts)
            sums.hidden.add(after, expected_after)
        if streams.ablated is not None:
            bare = streams.ablated.rows(rows)
            off = torch.zeros_like(bare) if switched_off else student.mix(bare)
            streams.ablated.replace(rows, _finish(student, bare, off))
        streams.student.replace(rows, after)
    return sums


def _finish(layer: DecoderLayer, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    hidden = hidden + mixed
    return hidden + layer.feed_forward(hidden)


def _dynamics(layer: DecoderLayer, hidden: torch.Tensor) -> MixerDynamics | None:
    return None if layer.kda is None else mixer_dynamics(layer.kda, layer.input_norm(hidden))


def _layer_errors(
    student: LayerLoader,
    teacher: LayerLoader | None,
    streams: TextStreams,
    beside: _Beside,
    sums: Sequence[LayerSums],
) -> tuple[LayerErrors, ...]:
    if teacher is None:
        return ()
    assert streams.teacher is not None
    config, converted = student.config, converted_layers(student.config, teacher.config)
    alone: Sequence[float | None] = [None] * len(sums)
    if beside.replaced is not None:
        alone = beside.replaced.divergences(
            teacher.head(),
            streams.teacher.rows(slice(beside.replaced.rows)),
            vocab_size=config.vocab_size,
        )
    return tuple(
        one.errors(
            layer_idx,
            mixer="kda" if layer_idx in config.kda_layers else "mla",
            converted=layer_idx in converted,
            replaced_kl=kl,
        )
        for layer_idx, (one, kl) in enumerate(zip(sums, alone, strict=True))
    )


def _score(
    student: LayerLoader,
    teacher: LayerLoader | None,
    streams: TextStreams,
    text: PackedText,
    on_progress: ProgressCallback,
) -> dict[str, ModelScores]:
    """Return the scores of each model that ran, by its name in the report."""
    head = student.head()
    students = {"student": streams.student, "ablated": streams.ablated}
    running = {
        name: Stream(at.values, at.into(head)) for name, at in students.items() if at is not None
    }
    guide = None
    if teacher is not None:
        assert streams.teacher is not None
        guide = Stream(streams.teacher.values, streams.teacher.into(teacher.head()))
    scored, of_teacher = score_tokens(
        text.tokens[:, 1:],
        students=list(running.values()),
        teacher=guide,
        # A run's hidden states are held too, and are the longer rows where a vocabulary is small.
        vocab_size=max(student.config.vocab_size, student.config.hidden_size),
        on_progress=on_progress,
    )
    named = dict(zip(running, scored, strict=True))
    if of_teacher is not None:
        named["teacher"] = of_teacher
    return {name: summarise(scores, text.kinds) for name, scores in named.items()}
