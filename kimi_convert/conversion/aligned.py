"""Align an existing hybrid to its teacher, and write it anew: what was not trained is as it was.

Finished layers lie beside the output, in OUTPUT.calibration, until the output is complete: after
an interrupt the same call goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from kimi_convert.checkpoints.examples import calibration_text as bundled_text
from kimi_convert.checkpoints.hashing import sha256_of_file
from kimi_convert.checkpoints.output import open_output
from kimi_convert.checkpoints.written import WrittenFile, WrittenShard
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import CONFIG_FILE, read_config
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.config.recipe import Recipe
from kimi_convert.config.target_format import TargetFormat
from kimi_convert.conversion.align_stages import (
    AlignRequest,
    AlignStages,
    Reached,
    last_parameter,
    open_store,
)
from kimi_convert.conversion.calibration.fingerprint import digest_of, fingerprint
from kimi_convert.conversion.calibration.outcome import Outcome
from kimi_convert.conversion.calibration.ranks import Ranks
from kimi_convert.conversion.calibration.realign import LayerAlignment, layer_alignment
from kimi_convert.conversion.conversion_record import (
    CONVERSION_FILE,
    extend_conversion_record,
    read_conversion_record,
)
from kimi_convert.conversion.fitted import (
    check_output,
    check_text,
    removed_if_refused,
    work_folder,
)
from kimi_convert.conversion.plan import DEFAULT_MAX_SHARD_BYTES
from kimi_convert.conversion.rewriting import plan_rewriting, write_weights
from kimi_convert.conversion.target import target_config
from kimi_convert.errors import ConfigError
from kimi_convert.model.backend import usable_device


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignResult:
    """What an alignment reached, and what was written."""

    output: Path
    files: tuple[WrittenFile | WrittenShard, ...]
    text_name: str
    layers: tuple[LayerAlignment, ...]  # none where no steps were asked for
    before: Outcome
    after: Outcome
    distilled: Mapping[str, object] | None  # what the distillation noted

    def to_json(self) -> dict[str, object]:
        """Return the document that `align --json` prints."""
        return {
            "output": str(self.output),
            "text": self.text_name,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "distilled": None if self.distilled is None else dict(self.distilled),
            "files": [{"name": file.name, **file.to_json()} for file in self.files],
        }


def align_checkpoint(
    teacher: str | Path,
    student: str | Path,
    output: str | Path,
    *,
    request: AlignRequest,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    ranks: Ranks | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> AlignResult | None:
    """Align every mixer of a hybrid, distil it if asked to, and write it into a new or empty folder.

    Args:
        teacher: folder of the model that the hybrid was made from.
        student: folder of the hybrid; not changed.
        output: appears whole or not at all.
        request: steps, text and targets.
        device: where both models run.
        max_shard_bytes: of each file of weights, its header included.
        ranks: the processes that distil together; the first one does all else.
        on_progress: told of every stage.

    Returns:
        What was reached; None on all ranks but the first.

    Raises:
        ConfigError: the student is not a hybrid of that teacher.
        CheckpointError: one of both is not whole.
        InputError: the text cannot be used; CalibrationError where there is too little of it.
        OutputError: the output folder is taken or not apart, or the work folder another run's.
        ResourceError: the disk is full or cannot be written.
        VerificationError: alignment or distillation diverges; what is finished is kept.
    """
    ranks = ranks or Ranks()
    teacher, student, output = Path(teacher), Path(student), Path(output)
    at = usable_device(device)
    text = bundled_text() if request.text is None else request.text
    configs = read_config(teacher), read_config(student)
    _check_pair(*configs, where=student)
    everything = request.calibration.distill.trains_all
    if everything and configs[1].tie_word_embeddings:
        raise _tied(student)
    job = plan_rewriting(student, configs[1], max_shard_bytes, everything=everything)
    record = read_conversion_record(student)
    for folder in (teacher, student) if ranks.is_first else ():
        check_output(output, source=folder, nbytes=job.shards.file_bytes, shareable=job.shareable)
    check_text(text, student)
    work = work_folder(output)
    with removed_if_refused(work) if ranks.is_first else nullcontext():
        store = open_store(work, _digest(teacher, student, text, request), ranks)
        reached = AlignStages(
            teacher, student, text, request, store, at, ranks, on_progress
        ).reach()
    if not ranks.is_first or reached is None:
        ranks.wait()
        return None
    aligns = request.calibration.align.steps > 0
    layers = tuple(
        layer_alignment(store, n) for n in range(configs[1].num_layers if aligns else 0)
    )
    with open_output(output, source=student) as target:
        write_weights(target, job, partial(last_parameter, store), on_progress)
        if record is not None:
            told = _told(teacher, text, request, layers, reached)
            extended = extend_conversion_record(record, target.files, changes={"aligned": told})
            target.write_json(CONVERSION_FILE, extended)
        result = AlignResult(
            output=target.folder,
            files=target.files,
            text_name=text.name,
            layers=layers,
            before=reached.before,
            after=reached.after,
            distilled=reached.distilled,
        )
    store.remove()
    ranks.wait()
    return result


def _check_pair(teacher: ModelConfig, student: ModelConfig, *, where: Path) -> None:
    """Refuse a student that no conversion of the teacher has the form of."""
    if student.kda is None:
        raise ConfigError(
            "there is nothing to align",
            where=where,
            expected="a hybrid of KDA and MLA layers",
            found=student.model_type,
            hint="Make one with `kimi-convert convert`.",
        )
    if student.quantization is not None or student.num_mtp_layers:
        raise ConfigError(
            "this hybrid cannot be aligned as it is stored",
            where=where,
            expected="plain weights, and no MTP layers",
            found="quantised weights" if student.quantization else "MTP layers",
            hint="Convert its teacher without them, and align that.",
        )
    recipe = Recipe(
        keep_layers=student.mla_layers,
        short_conv_size=student.kda.conv_size,
        output_format=TargetFormat(student.model_type),
    )
    if student.num_layers != teacher.num_layers:
        raise _not_a_pair("num_hidden_layers", teacher.num_layers, student.num_layers, where)
    made = target_config(teacher, recipe)
    for name in ("hidden_size", "vocab_size", "intermediate_size", "mla", "kda", "moe"):
        expected, found = getattr(made, name), getattr(student, name)
        if name == "mla":
            expected, found = replace(expected, rope=None), replace(found, rope=None)
        if expected != found:
            raise _not_a_pair(name, expected, found, where)


def _not_a_pair(name: str, expected: object, found: object, where: Path) -> ConfigError:
    return ConfigError(
        f"this hybrid was not made from that teacher: {name} differs",
        where=where,
        expected=expected,
        found=found,
        hint="Give the checkpoint that the hybrid was converted from.",
    )


def _tied(student: Path) -> ConfigError:
    return ConfigError(
        "the output matrix of this hybrid is its embedding, which cannot be trained as one",
        where=student,
        expected="tie_word_embeddings: false",
        found=True,
        hint="Train the mixers alone: distill.parameters = 'mixers'.",
    )


def _told(
    teacher: Path,
    text: Path,
    request: AlignRequest,
    layers: tuple[LayerAlignment, ...],
    reached: Reached,
) -> dict[str, object]:
    return {
        "teacher": {
            "name": teacher.resolve().name,
            "config_sha256": sha256_of_file(teacher / CONFIG_FILE),
        },
        "targets": str(request.targets),
        "seed": request.seed,
        "recipe": request.calibration.to_json(),
        "text": {"name": text.name, "sha256": sha256_of_file(text)},
        "before": reached.before.to_json(),
        "after": reached.after.to_json(),
        "layers": [layer.to_json() for layer in layers],
        **({} if reached.distilled is None else {"distilled": dict(reached.distilled)}),
    }


def _digest(teacher: Path, student: Path, text: Path, request: AlignRequest) -> str:
    return digest_of(
        {
            "teacher": fingerprint(teacher),
            "student": fingerprint(student),
            "recipe": request.calibration.to_json(),
            "targets": str(request.targets),
            "seed": request.seed,
            "text": sha256_of_file(text),
        }
    )
