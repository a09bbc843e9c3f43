"""`kimi-convert inspect`: what a checkpoint folder holds, without reading a tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kimi_convert.commands._numbers import bytes_text, count_text, layers_text, seconds_text
from kimi_convert.commands._options import JsonOpt, NamedCheckpointArg, QuietOpt, VerboseOpt
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Report, Section, Sentence, Table

if TYPE_CHECKING:
    from kimi_convert.config.architecture import MlaConfig, ModelConfig
    from kimi_convert.config.descendants import Descendant
    from kimi_convert.hub.sources import Source
    from kimi_convert.model.summary import CheckpointSummary

EXAMPLE = "kimi-convert inspect ./Moonlight-16B-A3B"
_SHOWN_SHARDS = 10


def inspect(
    checkpoint: NamedCheckpointArg,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Show a checkpoint's architecture, layers, sizes and problems; exit 3 if it has problems.

    Only config.json, the index and the headers of the files are read, on the Hub too.
    """
    from kimi_convert.hub.sources import open_headers

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    with open_headers(checkpoint) as source:
        descendant = _descendant(source.folder)
        if descendant is not None:
            output.show(descendant, lambda: descendant_report(descendant, source.name))
            return
        summary = _summary(source)
    output.show(_Inspected(summary), lambda: checkpoint_report(summary))
    if summary.problems:
        raise typer.Exit(summary.problems[0].exit_code)


def _summary(source: Source) -> CheckpointSummary:
    from kimi_convert.model.summary import summarize_checkpoint

    summary = summarize_checkpoint(source.folder)
    problems = tuple(source.named(problem) for problem in summary.problems)
    return replace(summary, folder=source.name, problems=problems)


def _descendant(folder: Path) -> Descendant | None:
    from kimi_convert.config.descendants import recognise_descendant
    from kimi_convert.config.huggingface import CONFIG_FILE, read_json_object

    path = folder / CONFIG_FILE
    return recognise_descendant(read_json_object(path)) if path.is_file() else None


@dataclass(frozen=True, slots=True)
class _Inspected:
    """What `inspect --json` prints: the checkpoint, and what a conversion would give."""

    checkpoint: CheckpointSummary

    def to_json(self) -> dict[str, object]:
        """Return the document."""
        from kimi_convert.conversion.outlook import Outlook, conversion_outlook
        from kimi_convert.model.cache_size import cache_size

        outlook = conversion_outlook(self.checkpoint.config)
        return {
            **self.checkpoint.to_json(),
            "cache": cache_size(self.checkpoint.config).to_json(),
            "conversion": outlook.to_json() if isinstance(outlook, Outlook) else None,
        }


def descendant_report(found: Descendant, checkpoint: Path) -> Report:
    """Return what `inspect` shows of a hybrid that came after Kimi-Linear."""
    mla = tuple(n for n in range(found.num_layers) if n not in found.kda_layers)
    facts = (
        ("family", found.family),
        ("architecture", found.model_type),
        ("KDA layers", f"{len(found.kda_layers)}: {layers_text(found.kda_layers)}"),
        ("full attention", f"{len(mla)}: {layers_text(mla)}"),
        *((name, str(size)) for name, size in found.sizes.items()),
    )
    rows = tuple((feature,) for feature in found.features)
    return (
        Facts(f"Checkpoint {checkpoint}", facts),
        Table("What it has and Kimi-Linear has not", ("feature",), rows),
        Sentence(
            "A descendant of Kimi-Linear: `convert` and `validate` do not support it yet.",
            warns=True,
        ),
    )


def checkpoint_report(summary: CheckpointSummary) -> Report:
    """Return what `inspect` shows."""
    report: list[Section] = [
        Facts(f"Checkpoint {summary.folder}", _facts(summary)),
        _layers(summary),
        _parts(summary),
        *_outlook(summary),
    ]
    if summary.shards:
        report += [_dtypes(summary), _shards(summary)]
    if summary.dropped:
        report.append(_dropped(summary))
    for problem in summary.problems:
        report.append(Sentence(f"Problem: {problem}. {problem.hint}", warns=True))
    if not summary.problems:
        report.append(
            Sentence("No problem found: every tensor that config.json asks for is there.")
        )
    return report


def _facts(summary: CheckpointSummary) -> tuple[tuple[str, str], ...]:
    config = summary.config
    facts = [
        ("architecture", config.model_type),
        (
            "parameters",
            f"{count_text(summary.parameters)}, {count_text(summary.active_parameters)} per token",
        ),
        ("on disk", bytes_text(summary.file_bytes) if summary.shards else "unknown"),
        (
            "layers",
            f"{config.num_layers}: {len(config.kda_layers)} KDA, {len(config.mla_layers)} MLA",
        ),
        ("hidden size", str(config.hidden_size)),
        ("vocabulary", str(config.vocab_size)),
        ("longest context", f"{config.max_positions} tokens"),
    ]
    return (*facts, *_mixers(config), *_experts(config))


def _mixers(config: ModelConfig) -> Iterator[tuple[str, str]]:
    mla, kda = config.mla, config.kda
    q = f"query rank {mla.q_lora_rank}" if mla.q_lora_rank else "full query"
    yield (
        "MLA",
        (
            f"{mla.num_heads} heads, key {mla.qk_nope_head_dim} + {mla.qk_rope_head_dim} rope, "
            f"value {mla.v_head_dim}, latent {mla.kv_lora_rank}, {q}"
        ),
    )
    yield "position", _position(mla)
    if kda is not None:
        yield "KDA", f"{kda.num_heads} heads of {kda.head_dim}, convolution {kda.conv_size}"


def _experts(config: ModelConfig) -> Iterator[tuple[str, str]]:
    moe = config.moe
    if moe is not None:
        routed = f"{moe.num_experts_per_token} of {moe.num_experts} routed"
        yield "experts", f"{routed}, {moe.num_shared_experts} shared, {moe.scoring} scores"


def _position(mla: MlaConfig) -> str:
    rope = mla.rope
    if rope is None:
        return "none (NoPE)"
    yarn = f", YaRN factor {rope.yarn.factor:g}" if rope.yarn else ""
    return f"RoPE, theta {rope.theta:g}{yarn}"


def _layers(summary: CheckpointSummary) -> Table:
    rows: list[tuple[str, ...]] = []
    kinds = groupby(
        summary.layers, lambda layer: (layer.mixer, layer.feed_forward, layer.parameters)
    )
    for (mixer, feed_forward, parameters), run in kinds:
        span = layers_text(tuple(layer.layer_idx for layer in run))
        rows.append((span, mixer.upper(), feed_forward, count_text(parameters)))
    return Table(
        "Layers, counted from 0",
        ("layers", "mixer", "feed-forward", "parameters each"),
        tuple(rows),
        right=("parameters each",),
    )


def _parts(summary: CheckpointSummary) -> Table:
    rows = tuple(
        (part.part, count_text(part.parameters), count_text(part.active_parameters))
        for part in summary.parts
    )
    return Table(
        "Parameters by part",
        ("part", "parameters", "per token"),
        rows,
        right=("parameters", "per token"),
    )


def _outlook(summary: CheckpointSummary) -> Iterator[Section]:
    """Show what is kept of a sequence, and what a conversion would make of it."""
    from kimi_convert.conversion.outlook import Outlook, conversion_outlook
    from kimi_convert.model.cache_size import CONTEXTS, cache_size

    now, outlook = cache_size(summary.config), conversion_outlook(summary.config)
    columns, rows = (
        ("context", "as it is"),
        [
            ("each token", bytes_text(now.bytes_per_token)),
            ("each sequence", bytes_text(now.bytes_per_sequence)),
            *((f"{tokens // 1024}K tokens", bytes_text(now.at(tokens))) for tokens in CONTEXTS),
        ],
    )
    if isinstance(outlook, Outlook):
        then = outlook.cache
        columns = (*columns, "converted")
        amounts = (
            bytes_text(then.bytes_per_token),
            bytes_text(then.bytes_per_sequence),
            *(f"{bytes_text(then.at(t))} ({_less(now.at(t), then.at(t))})" for t in CONTEXTS),
        )
        rows = [(*row, amount) for row, amount in zip(rows, amounts, strict=True)]
    title = "Memory of one sequence: bf16 cache of MLA, fp32 state of KDA"
    yield Table(title, columns, tuple(rows), right=columns[1:])
    if isinstance(outlook, Outlook):
        facts = (
            ("layers", f"{outlook.kda_layers} KDA, {outlook.mla_layers} MLA"),
            ("parameters", count_text(outlook.parameters)),
            ("output", f"{bytes_text(outlook.output_bytes)} of {summary.config.dtype}"),
            ("time to write", f"about {seconds_text(outlook.writing_seconds)} at 250 MB/s"),
        )
        yield Facts("Converted by the default recipe", facts)


def _less(now: int, then: int) -> str:
    change = 100 * (then - now) / now
    return f"{change:+.0f}%"


def _dtypes(summary: CheckpointSummary) -> Table:
    rows = tuple((row.dtype, str(row.tensors), bytes_text(row.nbytes)) for row in summary.dtypes)
    return Table("Stored tensors", ("dtype", "tensors", "size"), rows, right=("tensors", "size"))


def _shards(summary: CheckpointSummary) -> Table:
    rows = [
        (shard.name, str(shard.tensors), bytes_text(shard.nbytes))
        for shard in summary.shards[:_SHOWN_SHARDS]
    ]
    more = summary.shards[_SHOWN_SHARDS:]
    if more:
        tensors = sum(shard.tensors for shard in more)
        nbytes = sum(shard.nbytes for shard in more)
        rows.append((f"and {len(more)} more", str(tensors), bytes_text(nbytes)))
    return Table("Files", ("file", "tensors", "size"), tuple(rows), right=("tensors", "size"))


def _dropped(summary: CheckpointSummary) -> Table:
    reasons = Counter(dropped.why for dropped in summary.dropped)
    rows = tuple((str(count), why) for why, count in reasons.items())
    return Table("Stored, but never read", ("tensors", "why"), rows, right=("tensors",))
