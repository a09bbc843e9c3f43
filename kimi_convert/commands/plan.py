"""`kimi-convert plan`: what a conversion would read, make and write; nothing is written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_convert.commands._numbers import bytes_text, files_text, layers_text
from kimi_convert.commands._options import (
    DEFAULT_MAX_SHARD_SIZE,
    DtypeOpt,
    JsonOpt,
    MaxShardSizeOpt,
    MtpOpt,
    QuietOpt,
    RecipeOpt,
    SourceArg,
    VerboseOpt,
)
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Report, Sentence, Table
from kimi_convert.config.output_format import AS_SOURCE, MtpLayers, OutputFormat, TargetDtype

if TYPE_CHECKING:
    from kimi_convert.config.recipe import Recipe
    from kimi_convert.conversion import ConversionPlan
    from kimi_convert.conversion.tasks import TensorTask

EXAMPLE = "kimi-convert plan ./Moonlight-16B-A3B --recipe recipe.toml"
_SHOWN_TARGETS = 4


def plan(
    source: SourceArg,
    recipe: RecipeOpt = None,
    max_shard_size: MaxShardSizeOpt = DEFAULT_MAX_SHARD_SIZE,
    dtype: DtypeOpt = TargetDtype.SOURCE,
    mtp: MtpOpt = MtpLayers.DROP,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Show what a conversion would do, to the byte, without doing it.

    With --json every tensor is listed, with its operation and its sources.
    """
    from kimi_convert.checkpoints.byte_size import parse_byte_size
    from kimi_convert.config.recipe import load_recipe

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    made = plan_source(
        source,
        load_recipe(recipe),
        limit=parse_byte_size(max_shard_size),
        output_format=OutputFormat(dtype=dtype, mtp=mtp),
    )
    output.show(made, lambda: plan_report(made))


def plan_source(
    source: Path, recipe: Recipe, *, limit: int, output_format: OutputFormat = AS_SOURCE
) -> ConversionPlan:
    """Return the plan for a folder, or for a repository of which headers alone are read."""
    from kimi_convert.conversion import plan_conversion
    from kimi_convert.hub.sources import open_headers

    with open_headers(source) as opened:
        made = plan_conversion(
            opened.folder, recipe, max_shard_bytes=limit, output_format=output_format
        )
    return made.named(opened.name)


def plan_report(plan: ConversionPlan) -> Report:
    """Return what `plan` shows."""
    sections = (*brief_plan(plan), _rules(plan), runtimes_table(plan), _recipe(plan))
    return (*sections, _dropped(plan)) if plan.dropped else sections


def brief_plan(plan: ConversionPlan) -> Report:
    """Return sizes and layers alone."""
    return (_sizes(plan), _layers(plan), *_choice(plan))


def runtimes_table(plan: ConversionPlan) -> Table:
    """Return which runtimes load the output, and why others do not."""
    rows = tuple(
        (support.runtime, "yes" if support.loads else "no", "; ".join(support.reasons))
        for support in plan.runtimes
    )
    return Table("Runtimes that load the output", ("runtime", "loads", "why not"), rows)


def _sizes(plan: ConversionPlan) -> Facts:
    return Facts(
        f"Conversion of {plan.source}",
        (
            (
                "architecture",
                f"{plan.source_config.model_type} to {plan.target_config.model_type}",
            ),
            ("to read", bytes_text(plan.read_bytes)),
            (
                "to write",
                f"{bytes_text(plan.write_bytes)} of weights in {files_text(len(plan.shards.shards))}",
            ),
            ("copied bit for bit", _copied_text(plan)),
            ("memory to write it", _memory_text(plan)),
        ),
    )


def _copied_text(plan: ConversionPlan) -> str:
    copied, shared = bytes_text(plan.copied_bytes), plan.shareable().nbytes
    if not shared:
        return copied
    return (
        f"{copied}; {bytes_text(shared)} take no room where the disk shares blocks with the source"
    )


def _memory_text(plan: ConversionPlan) -> str:
    from kimi_convert.conversion.memory import memory_bytes

    whole = bytes_text(memory_bytes(plan, plan.tasks))
    return f"{whole} for each job at most, tensors of {bytes_text(plan.peak_memory_bytes)} in it"


def _layers(plan: ConversionPlan) -> Table:
    target = plan.target_config
    mixers = (("MLA to KDA", target.kda_layers), ("MLA stays, without RoPE", target.mla_layers))
    rows = tuple((what, str(len(layers)), layers_text(layers)) for what, layers in mixers)
    return Table("Layers, counted from 0", ("mixer", "layers", "which"), rows, right=("layers",))


def _choice(plan: ConversionPlan) -> tuple[Sentence, ...]:
    """Say where the layers above are not the last word."""
    if not plan.recipe.choose_layers:
        return ()
    count = len(plan.target_config.mla_layers)
    return (
        Sentence(
            f"Which {count} layers stay MLA is measured by `convert`; planned is the released "
            "pattern, and any other writes as much."
        ),
    )


def _rules(plan: ConversionPlan) -> Table:
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    targets: dict[str, dict[str, None]] = {}  # a set that keeps its order
    for task in plan.tasks:
        tensors[task.op] += 1
        nbytes[task.op] += task.tensor.nbytes
        targets.setdefault(task.op, {})[_kind(task)] = None
    rows = tuple(
        (op, str(tensors[op]), bytes_text(nbytes[op]), _listed(tuple(kinds)))
        for op, kinds in targets.items()
    )
    return Table("Rules", ("rule", "tensors", "size", "makes"), rows, right=("tensors", "size"))


def _kind(task: TensorTask) -> str:
    """Return a parameter's name without layer and expert."""
    fields = [field for field in task.param.split(".") if not field.isdigit()]
    return ".".join(fields).removeprefix("layers.").removesuffix(".weight")


def _listed(kinds: tuple[str, ...]) -> str:
    more = len(kinds) - _SHOWN_TARGETS
    shown = ", ".join(kinds[:_SHOWN_TARGETS])
    return f"{shown} and {more} more kinds" if more > 0 else shown


def _recipe(plan: ConversionPlan) -> Facts:
    fields = plan.recipe.to_json().items()
    return Facts("Recipe", tuple((name, str(value)) for name, value in fields))


def _dropped(plan: ConversionPlan) -> Table:
    reasons = Counter(dropped.why for dropped in plan.dropped)
    rows = tuple((str(count), why) for why, count in reasons.items())
    return Table(
        "In the source, but not carried over", ("tensors", "why"), rows, right=("tensors",)
    )
