"""`kimi-convert export onnx`: write a checkpoint as an ONNX graph with operators for KDA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_convert.commands._numbers import bytes_text
from kimi_convert.commands._options import CheckpointArg, JsonOpt, QuietOpt, VerboseOpt
from kimi_convert.commands._output import Output
from kimi_convert.commands._report import Facts, Report
from kimi_convert.exporters.onnx.options import (
    CustomBody,
    MlaForm,
    MoeForm,
    OnnxOptions,
    Precision,
    Quantization,
    Target,
    WeightPlacement,
    require_onnx,
)

if TYPE_CHECKING:
    from kimi_convert.exporters.onnx.job import OnnxJobResult
    from kimi_convert.exporters.onnx.text_comparison import TextComparison

EXAMPLE = "kimi-convert export onnx ./hybrid ./hybrid-onnx --last-logits"

OutputFolderArg = Annotated[
    Path | None,
    typer.Argument(
        metavar="OUTPUT",
        help="Folder to write, new or empty; left out with --weights inplace.",
        show_default=False,
    ),
]
TargetOpt = Annotated[
    Target, typer.Option(help="Operators for KDA: ONNX Runtime's, opset 27's, or our own.")
]
CustomBodyOpt = Annotated[
    CustomBody, typer.Option(help="What the functions of target custom are made of.")
]
WeightsOpt = Annotated[
    WeightPlacement,
    typer.Option(help="Copy the weights, or point at them in the checkpoint's own files."),
]
MlaOpt = Annotated[
    MlaForm, typer.Option(help="Keep keys and values of MLA layers, or the smaller latents.")
]
MoeOpt = Annotated[
    MoeForm | None,
    typer.Option(help="How routed experts run; by default the fastest.", show_default=False),
]
PrecisionOpt = Annotated[
    Precision, typer.Option(help="Of weights and activations; bf16 is of stored weights alone.")
]
QuantizeOpt = Annotated[
    Quantization | None,
    typer.Option(help="Store matrices as integers in blocks of 32.", show_default=False),
]
LastLogitsOpt = Annotated[
    bool, typer.Option("--last-logits", help="Give logits of the last position alone.")
]
OpsetOpt = Annotated[
    int | None,
    typer.Option(help="Of the standard's operators; by default the oldest.", show_default=False),
]
RuntimeOpt = Annotated[
    str | None,
    typer.Option(
        metavar="VERSION",
        help="Oldest ONNX Runtime that shall load the graph, such as 1.24.",
        show_default=False,
    ),
]
TextOpt = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text to run through checkpoint and graph afterwards: .txt, or .jsonl.",
        show_default=False,
    ),
]


def onnx(
    checkpoint: CheckpointArg,
    output_folder: OutputFolderArg = None,
    target: TargetOpt = Target.ORT,
    custom_body: CustomBodyOpt = CustomBody.PORTABLE,
    weights: WeightsOpt = WeightPlacement.COPY,
    mla: MlaOpt = MlaForm.MATERIALISED,
    moe: MoeOpt = None,
    precision: PrecisionOpt = Precision.FP32,
    quantize: QuantizeOpt = None,
    last_logits: LastLogitsOpt = False,
    opset: OpsetOpt = None,
    runtime: RuntimeOpt = None,
    text: TextOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Write a checkpoint as an ONNX graph: prefill and decode in one, KDA as operators."""
    options = OnnxOptions(
        target=target,
        custom_body=custom_body,
        weights=weights,
        mla=mla,
        moe=moe,
        precision=precision,
        quantize=quantize,
        last_logits=last_logits,
        opset_version=opset,
        runtime=runtime,
    )
    folder = options.output_folder(checkpoint, output_folder)
    require_onnx()
    from kimi_convert.exporters.onnx.job import export_and_compare

    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    with output.progress() as on_progress:
        result = export_and_compare(
            checkpoint, folder, options=options, text=text, on_progress=on_progress
        )
    output.show(result, lambda: export_report(result))


def export_report(result: OnnxJobResult) -> Report:
    """Return what `export onnx` shows."""
    export, comparison = result.export, result.comparison
    options = export.options
    facts = (
        ("target", f"{options.target}, opset {options.opset}"),
        ("nodes", str(export.nodes)),
        ("functions", ", ".join(export.functions) or "none"),
        *((name, bytes_text(nbytes)) for name, nbytes in export.files),
        ("ONNX checker", "full check passed"),
    )
    exported = Facts(f"Exported to {export.output}", facts)
    if comparison is None:
        return (exported,)
    return (exported, _comparison_facts(comparison))


def _comparison_facts(comparison: TextComparison) -> Facts:
    facts = (
        ("tokens", str(comparison.tokens)),
        ("loss of the checkpoint", f"{comparison.checkpoint_loss:.4f}"),
        ("loss of the graph", f"{comparison.graph_loss:.4f}"),
        ("increase", f"{comparison.loss_increase:+.4f}"),
        ("logits differ by", f"{comparison.logits_error:.1e} of the largest"),
        ("top-1 agreement", f"{comparison.top1_agreement:.1%}"),
    )
    return Facts(f"On {comparison.text}, nats per token", facts)
