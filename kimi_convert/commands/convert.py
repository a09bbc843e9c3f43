"""`kimi-convert convert`: make a Kimi-Linear hybrid from an MLA checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kimi_convert.commands._numbers import bytes_text, layers_text, seconds_text
from kimi_convert.commands._options import (
    DEFAULT_MAX_SHARD_SIZE,
    CalibrationOpt,
    DeviceOpt,
    JsonOpt,
    MaxShardSizeOpt,
    OutputArg,
    QuietOpt,
    RecipeOpt,
    SourceArg,
    VerboseOpt,
)
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Report
from kimi_convert.commands.plan import plan_report, runtimes_table

if TYPE_CHECKING:
    from kimi_convert.conversion import ConversionResult

EXAMPLE = "kimi-convert convert ./Moonlight-16B-A3B ./hybrid --recipe recipe.toml"

DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")]


def convert(
    source: SourceArg,
    output_folder: OutputArg,
    recipe: RecipeOpt = None,
    calibration: CalibrationOpt = None,
    device: DeviceOpt = "cpu",
    max_shard_size: MaxShardSizeOpt = DEFAULT_MAX_SHARD_SIZE,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Turn an MLA checkpoint into a hybrid of KDA and MLA layers.

    The output folder appears whole or not at all, and the same call gives the same bytes.
    """
    from kimi_convert.checkpoints.byte_size import parse_byte_size
    from kimi_convert.config.recipe import load_recipe
    from kimi_convert.conversion import convert_checkpoint, plan_conversion

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    chosen, limit = load_recipe(recipe), parse_byte_size(max_shard_size)
    if dry_run:
        plan = plan_conversion(source, chosen, max_shard_bytes=limit)
        output.show(plan, lambda: plan_report(plan))
        return
    with output.progress() as on_progress:
        result = convert_checkpoint(
            source,
            output_folder,
            recipe=chosen,
            text=calibration,
            device=device,
            max_shard_bytes=limit,
            on_progress=on_progress,
        )
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
        ("time", seconds_text(result.seconds)),
    )
    return (Facts(f"Converted {plan.source} to {result.output}", facts), runtimes_table(plan))
