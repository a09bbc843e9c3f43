"""`kimi-convert export`: write a checkpoint in a form that other programs load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kimi_convert.commands._numbers import bytes_text
from kimi_convert.commands._options import (
    DEFAULT_MAX_SHARD_SIZE,
    CheckpointArg,
    Dtype,
    JsonOpt,
    MaxShardSizeOpt,
    OutputArg,
    QuietOpt,
    VerboseOpt,
)
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Report

if TYPE_CHECKING:
    from kimi_convert.exporters.safetensors import ExportResult

HELP = "Write a checkpoint in a form that other programs load."
SAFETENSORS_EXAMPLE = (
    "kimi-convert export safetensors ./hybrid ./hybrid-f32 --dtype float32 --max-shard-size 2GB"
)

DtypeOpt = Annotated[
    Dtype | None,
    typer.Option(help="Of all weights; left out, each stays as it is.", show_default=False),
]


def safetensors(
    checkpoint: CheckpointArg,
    output_folder: OutputArg,
    max_shard_size: MaxShardSizeOpt = DEFAULT_MAX_SHARD_SIZE,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Write a checkpoint again: in files of another size, in another dtype."""
    from kimi_convert.checkpoints.byte_size import parse_byte_size
    from kimi_convert.conversion.memory import use_one_heap
    from kimi_convert.exporters.safetensors import export_safetensors

    use_one_heap()
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    with output.progress() as on_progress:
        result = export_safetensors(
            checkpoint,
            output_folder,
            max_shard_bytes=parse_byte_size(max_shard_size),
            dtype=dtype.value if dtype else None,
            on_memory=lambda nbytes: output.note(f"memory: {bytes_text(nbytes)} at most"),
            on_progress=on_progress,
        )
    output.show(result, lambda: export_report(result))


def export_report(result: ExportResult) -> Report:
    """Return what `export safetensors` shows."""
    facts = (
        ("tensors", f"{result.tensors}, {bytes_text(result.nbytes)}"),
        ("files", str(len(result.files))),
        ("dtype", result.dtype),
        ("tensors in another dtype", str(len(result.changed_dtype))),
        ("tensors under another name", str(len(result.renamed))),
    )
    return (Facts(f"Exported to {result.output}", facts),)
