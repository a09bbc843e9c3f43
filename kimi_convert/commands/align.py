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
from kimi_convert.errors import RecipeError, ResourceError, UsageError, VerificationError

if TYPE_CHECKING:
    from kimi_convert.config.recipe import Recipe
    from kimi_convert.conversion.aligned import AlignResult
    from kimi_convert.conversion.calibration.realign import LayerAlignment

EXAMPLE = "kimi-convert align ./Moonlight-16B-A3B ./hybrid ./hybrid-aligned --steps 600"


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
        min=0,
        help="Gradient steps on each mixer; by default the recipe's align.steps, else 600, and "
        "none where --distill is given.",
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
DistillOpt = Annotated[
    int | None,
    typer.Option(
        "--distill",
        metavar="TOKENS",
        min=1,
        help="Then train all mixers together on so many tokens, or all parameters if the recipe "
        "says so; under torchrun, on every device.",
        show_default=False,
    ),
]
_STEPS = 600


def align(
    teacher: TeacherArg,
    student: StudentArg,
    output_folder: OutputArg,
    steps: StepsOpt = None,
    distill: DistillOpt = None,
    targets: TargetsOpt = TargetsName.SEQUENTIAL,
    recipe: RecipeOpt = None,
    calibration: CalibrationOpt = None,
    device: DeviceOpt = "cpu",
    max_shard_size: MaxShardSizeOpt = DEFAULT_MAX_SHARD_SIZE,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Train the mixers of a hybrid towards its teacher, and write it anew.

    Each alone, layer by layer; with --distill also all together, with all else if the recipe's
    distill.parameters is "all", on several devices with
    torchrun --nproc-per-node N -m kimi_convert align. Of a recipe, the sections calibration,
    align, distill and kda.seed count. The output folder appears whole or not at all; the same call
    goes on from what an interrupted one has finished.
    """
    from kimi_convert.checkpoints.byte_size import parse_byte_size
    from kimi_convert.conversion.align_stages import AlignRequest
    from kimi_convert.conversion.aligned import align_checkpoint
    from kimi_convert.conversion.calibration.ranks import joined_ranks
    from kimi_convert.conversion.calibration.realign import Targets
    from kimi_convert.model.backend import usable_device

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    chosen = _recipe(recipe, steps, distill)
    assert chosen.calibration is not None
    request = AlignRequest(
        calibration=chosen.calibration,
        targets=Targets(targets.value),
        seed=chosen.seed,
        text=calibration,
    )
    with joined_ranks(usable_device(device)) as (ranks, own_device):
        if not ranks.is_first:
            output = Output(as_json=False, quiet=True, verbose=verbose)
        with _resumable(output_folder, output), output.progress() as on_progress:
            result = align_checkpoint(
                teacher,
                student,
                output_folder,
                request=request,
                device=own_device,
                max_shard_bytes=parse_byte_size(max_shard_size),
                ranks=ranks,
                on_progress=on_progress,
            )
    if result is not None:
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
    tables = (table,) if result.layers else ()
    return (facts, *tables, *((warning,) if worse else ()))


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


def _recipe(path: Path | None, steps: int | None, distill: int | None) -> Recipe:
    from kimi_convert.config.recipe import load_recipe, with_training

    recipe = load_recipe(path)
    if recipe.calibration is None:
        raise RecipeError(
            "recipe fits nothing to text",
            where=path or "",
            expected='another method than "copy" under [init]',
            hint="Leave out --recipe: the defaults will do.",
        )
    wanted = steps if steps is not None else recipe.calibration.align.steps
    if steps is None and not wanted and not distill:
        wanted = _STEPS
    if not wanted and not distill:
        raise UsageError(
            "there is nothing to do", expected="--steps above 0, or --distill", found="--steps 0"
        )
    return with_training(recipe, align_steps=wanted, distill_tokens=distill or 0)


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
