"""`kimi-convert align`: bring the mixers of an existing hybrid nearer to its teacher."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_convert.commands._options import (
    DEFAULT_MAX_SHARD_SIZE,
    CalibrationOpt,
    DeviceOpt,
    JsonOpt,
    MaxShardSizeOpt,
    OutputArg,
    QuietOpt,
    RecipeOpt,
    VerboseOpt,
)
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Report, Sentence, Table
from kimi_convert.errors import RecipeError, ResourceError, VerificationError

if TYPE_CHECKING:
    from kimi_convert.config.recipe import Recipe
    from kimi_convert.conversion.aligned import AlignResult
    from kimi_convert.conversion.calibration.realign import LayerAlignment

EXAMPLE = "kimi-convert align ./Moonlight-16B-A3B ./hybrid ./hybrid-aligned --steps 300"


class TargetsName(StrEnum):
    """What every layer is aligned to."""

    SEQUENTIAL = "sequential"
    FORCED = "forced"


TeacherArg = Annotated[
    Path,
    typer.Argument(
        metavar="TEACHER",
        help="Folder of the checkpoint that the hybrid was made from.",
        show_default=False,
    ),
]
StudentArg = Annotated[
    Path, typer.Argument(metavar="STUDENT", help="Folder of the hybrid.", show_default=False)
]
StepsOpt = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        help="Gradient steps on each mixer; by default the recipe's align.steps, else 300.",
        show_default=False,
    ),
]
TargetsOpt = Annotated[
    TargetsName,
    typer.Option(
        help="Aim each layer at the teacher's stream from the student's own (sequential), or at "
        "the teacher's mixer on the teacher's stream (forced)."
    ),
]
_STEPS = 300


def align(
    teacher: TeacherArg,
    student: StudentArg,
    output_folder: OutputArg,
    steps: StepsOpt = None,
    targets: TargetsOpt = TargetsName.SEQUENTIAL,
    recipe: RecipeOpt = None,
    calibration: CalibrationOpt = None,
    device: DeviceOpt = "cpu",
    max_shard_size: MaxShardSizeOpt = DEFAULT_MAX_SHARD_SIZE,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Train every mixer of a hybrid towards its teacher, layer by layer, and write it anew.

    Of a recipe, the sections calibration, align and kda.seed count. The output folder appears
    whole or not at all; the same call goes on from the layers that an interrupted one has finished.
    """
    from kimi_convert.checkpoints.byte_size import parse_byte_size
    from kimi_convert.conversion.aligned import AlignRequest, align_checkpoint
    from kimi_convert.conversion.calibration.realign import Targets

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    chosen = _recipe(recipe, steps)
    assert chosen.calibration is not None
    request = AlignRequest(
        calibration=chosen.calibration,
        targets=Targets(targets.value),
        seed=chosen.seed,
        text=calibration,
    )
    with _resumable(output_folder, output), output.progress() as on_progress:
        result = align_checkpoint(
            teacher,
            student,
            output_folder,
            request=request,
            device=device,
            max_shard_bytes=parse_byte_size(max_shard_size),
            on_progress=on_progress,
        )
    output.show(result, lambda: alignment_report(result))


def alignment_report(result: AlignResult) -> Report:
    """Return what `align` shows."""
    before, after = result.before, result.after
    facts = Facts(
        f"Aligned to {result.output}; on {after.tokens} tokens of {result.text_name} that "
        "trained nothing",
        (
            ("loss of the teacher", f"{after.teacher_loss:.4f} nats per token"),
            ("loss of the hybrid", f"{before.student_loss:.4f}, now {after.student_loss:.4f}"),
            ("KL to the teacher", f"{before.kl:.4f}, now {after.kl:.4f}"),
            ("top-1 agreement", f"{before.top1_agreement:.1%}, now {after.top1_agreement:.1%}"),
        ),
    )
    names = ("layer", "mixer", "error before", "error now", "cosine", "norm ratio", "output")
    table = Table(
        "Layers, counted from 0: distance from their targets on those tokens",
        names,
        tuple(_cells(layer) for layer in result.layers),
        right=names[2:6],
    )
    worse = after.kl >= before.kl
    warning = Sentence("The hybrid as a whole is not nearer to its teacher.", warns=True)
    return (facts, table, *((warning,) if worse else ()))


def _cells(layer: LayerAlignment) -> tuple[str, ...]:
    return (
        str(layer.layer_idx),
        layer.mixer.upper(),
        f"{layer.error_before:.3f}",
        f"{layer.error:.3f}",
        f"{layer.cosine:.3f}",
        f"{layer.norm_ratio:.3f}",
        layer.output,
    )


def _recipe(path: Path | None, steps: int | None) -> Recipe:
    from kimi_convert.config.recipe import load_recipe, with_training

    recipe = load_recipe(path)
    if recipe.calibration is None:
        raise RecipeError(
            "recipe fits nothing to text",
            where=path or "",
            expected='another method than "copy" under [init]',
            hint="Leave out --recipe: the defaults will do.",
        )
    wanted = steps or recipe.calibration.align.steps or _STEPS
    return with_training(recipe, align_steps=wanted, distill_tokens=0)


@contextmanager
def _resumable(folder: Path, output: Output) -> Generator[None]:
    """Say, where an alignment ends before its time, what is kept of it."""
    from kimi_convert.conversion.fitted import work_folder

    try:
        yield
    except (KeyboardInterrupt, ResourceError, VerificationError):
        work = work_folder(folder)
        if work.is_dir():
            output.note(
                f"finished layers are kept in {work}: the same command goes on from there; "
                "remove it to start anew"
            )
        raise
