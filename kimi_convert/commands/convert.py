"""`kimi-convert convert`: make a Kimi-Linear hybrid from an MLA checkpoint."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_convert.commands._fit import fit_report
from kimi_convert.commands._numbers import bytes_text, layers_text, seconds_text
from kimi_convert.commands._options import (
    DEFAULT_MAX_SHARD_SIZE,
    CalibrationOpt,
    DeviceOpt,
    DtypeOpt,
    EngineName,
    EngineOpt,
    JobsOpt,
    JsonOpt,
    MaxShardSizeOpt,
    MtpOpt,
    OutputArg,
    QuietOpt,
    RecipeOpt,
    ResumeOpt,
    SourceArg,
    VerboseOpt,
)
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Report
from kimi_convert.commands._source import open_streamed, open_whole
from kimi_convert.commands.plan import plan_report, plan_source, runtimes_table
from kimi_convert.config.output_format import MtpLayers, OutputFormat, TargetDtype
from kimi_convert.errors import HubError, ResourceError, UsageError, VerificationError

if TYPE_CHECKING:
    from kimi_convert.config.recipe import Recipe
    from kimi_convert.conversion import ConversionResult
    from kimi_convert.conversion.runners import Runner

EXAMPLE = "kimi-convert convert ./Moonlight-16B-A3B ./hybrid --recipe recipe.toml"

LayersOpt = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="WHICH",
        help="Which layers stay MLA: auto, released, or a list from 0 as 3,7.",
        show_default=False,
    ),
]
AlignOpt = Annotated[
    int | None,
    typer.Option(
        "--align", metavar="STEPS", min=0, help="Gradient steps on each mixer.", show_default=False
    ),
]
DistillOpt = Annotated[
    int | None,
    typer.Option(
        "--distill",
        metavar="TOKENS",
        min=0,
        help="Train all mixers together on so many tokens, or all parameters if the recipe says "
        "so.",
        show_default=False,
    ),
]
FormatOpt = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="kimi_linear, or bailing_hybrid, where MLA layers keep their rotation.",
        show_default=False,
    ),
]
NoTextOpt = Annotated[
    bool, typer.Option("--no-text", help="Fit nothing: a start for training, made in seconds.")
]
DiscardOpt = Annotated[
    bool,
    typer.Option(
        "--discard-source-shards",
        help="Fetch each file of a source on the Hub when it is read, and remove it after.",
    ),
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")]


def convert(
    source: SourceArg,
    output_folder: OutputArg,
    recipe: RecipeOpt = None,
    calibration: CalibrationOpt = None,
    layers: LayersOpt = None,
    align: AlignOpt = None,
    distill: DistillOpt = None,
    no_text: NoTextOpt = False,
    form: FormatOpt = None,
    device: DeviceOpt = "cpu",
    max_shard_size: MaxShardSizeOpt = DEFAULT_MAX_SHARD_SIZE,
    dtype: DtypeOpt = TargetDtype.SOURCE,
    mtp: MtpOpt = MtpLayers.DROP,
    jobs: JobsOpt = 1,
    engine: EngineOpt = EngineName.LOCAL,
    resume: ResumeOpt = False,
    discard: DiscardOpt = False,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Turn an MLA checkpoint into a hybrid of KDA and MLA layers.

    The output folder appears whole or not at all, and the same call gives the same bytes. What an
    interrupted run has finished is kept for --resume.
    """
    from kimi_convert.checkpoints.byte_size import parse_byte_size
    from kimi_convert.conversion import convert_checkpoint
    from kimi_convert.conversion.memory import use_one_heap

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    chosen = _recipe(recipe, layers=layers, align=align, distill=distill, no_text=no_text)
    chosen = _in_format(chosen, form)
    limit = parse_byte_size(max_shard_size)
    output_format = OutputFormat(dtype=dtype, mtp=mtp)
    if dry_run:
        plan = plan_source(source, chosen, limit=limit, output_format=output_format)
        output.show(plan, lambda: plan_report(plan))
        return
    if chosen.calibration is None:  # a fit has threads of its own, which allocate all the time
        use_one_heap()
    runner = _runner(jobs, engine)
    how = partial(open_streamed, output=output_folder) if discard else open_whole
    with (
        _resumable(output_folder, output),
        output.progress() as on_progress,
        how(source, chosen, limit=limit, runner=runner, on_progress=on_progress) as opened,
    ):
        if chosen.calibration is not None:
            output.note(_cost_text(opened.folder, chosen, device))
        result = convert_checkpoint(
            opened.folder,
            output_folder,
            recipe=chosen,
            text=calibration,
            device=device,
            max_shard_bytes=limit,
            output_format=output_format,
            resume=resume,
            runner=opened.runner,
            on_progress=on_progress,
        )
    result = replace(result, plan=result.plan.named(opened.name))
    output.show(result, lambda: conversion_report(result))


def conversion_report(result: ConversionResult) -> Report:
    """Return what `convert` shows."""
    plan = result.plan
    target = plan.target_config
    facts = (
        ("KDA layers", layers_text(target.kda_layers)),
        ("MLA layers", layers_text(target.mla_layers)),
        ("tensors", f"{len(plan.tasks)}, {bytes_text(plan.shards.total_size)}"),
        ("copied bit for bit", bytes_text(plan.copied_bytes)),
        ("files", str(len(result.files))),
        ("time to write", seconds_text(result.seconds)),
    )
    sections: Report = (Facts(f"Converted {plan.source} to {result.output}", facts),)
    if result.fit is not None:
        sections = (*sections, *fit_report(result.fit))
    return (*sections, runtimes_table(plan))


def _recipe(
    path: Path | None,
    *,
    layers: str | None,
    align: int | None,
    distill: int | None,
    no_text: bool,
) -> Recipe:
    """Return the recipe of the file, or the default one, with what the options change in it."""
    from kimi_convert.config.recipe import load_recipe, with_layers, with_training, without_text

    recipe = load_recipe(path)
    if no_text:
        recipe = without_text(recipe)
    recipe = with_training(recipe, align_steps=align, distill_tokens=distill)
    return recipe if layers is None else with_layers(recipe, layers)


def _runner(jobs: int, engine: EngineName) -> Runner:
    from kimi_convert.conversion.runners import Processes, one_by_one

    if engine is EngineName.LOCAL:
        return one_by_one if jobs == 1 else Processes(jobs)
    if jobs != 1:
        raise UsageError(
            "a Ray cluster runs as many jobs as it has cores and memory for",
            expected=f"--jobs or --engine {EngineName.RAY}",
            found="both",
            hint="Leave one of the two out.",
        )
    from kimi_convert.conversion.ray_cluster import RayCluster

    return RayCluster()


def _in_format(recipe: Recipe, name: str | None) -> Recipe:
    from kimi_convert.config.target_format import output_format

    return recipe if name is None else replace(recipe, output_format=output_format(name))


@contextmanager
def _resumable(folder: Path, output: Output) -> Generator[None]:
    """Say, where a conversion ends before its time, what is kept of it."""
    from kimi_convert.checkpoints.journal import JOURNAL_FILE
    from kimi_convert.checkpoints.staging import PARTIAL_FOLDER
    from kimi_convert.conversion.fitted import work_folder

    try:
        yield
    except (KeyboardInterrupt, HubError, ResourceError, VerificationError):
        work, partial = work_folder(folder), folder / PARTIAL_FOLDER
        if work.is_dir():
            output.note(
                f"finished layers are kept in {work}: the same command goes on from there; "
                "remove it to start anew"
            )
        if (partial / JOURNAL_FILE).exists():
            output.note(
                f"finished files are kept in {partial}: the same command with --resume goes on "
                "from there; remove it to start anew"
            )
        raise


def _cost_text(source: Path, recipe: Recipe, device: str) -> str:
    """Say what the calibration will take, before it starts."""
    from kimi_convert.config.huggingface import read_config
    from kimi_convert.conversion.calibration.cost import calibration_cost
    from kimi_convert.model.backend import usable_device

    assert recipe.calibration is not None
    on = usable_device(device)
    cost = calibration_cost(read_config(source), recipe.calibration, on)
    seconds = seconds_text(max(10.0, cost.seconds(on)))
    return (
        f"fitting to {recipe.calibration.tokens} tokens: about {seconds} and "
        f"{bytes_text(cost.memory_bytes)} of memory"
    )
