"""Write a checkpoint as an ONNX graph: plan, build, check, and only then let it appear.

With copied weights the output is a new folder of `model.onnx` and `model.onnx.data`, with the
tokenizer. In place, `model.onnx` appears in the checkpoint's folder and points at the bytes of its
shards; nothing else there is touched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from kimi_convert.checkpoints.addition import add_files
from kimi_convert.checkpoints.index import CheckpointIndex, open_index
from kimi_convert.checkpoints.messages import sized
from kimi_convert.checkpoints.output import open_output
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.bailing_hybrid import BAILING_TYPE
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ProgressCallback, ProgressEvent, ignore_progress
from kimi_convert.errors import CheckpointError, ConfigError, OutputError
from kimi_convert.exporters.onnx.copied_weights import DATA_FILE, CopiedWeights, PlannedBytes
from kimi_convert.exporters.onnx.genai import GENAI_CONFIG_FILE, genai_config, genai_runs
from kimi_convert.exporters.onnx.graph import build_model
from kimi_convert.exporters.onnx.options import OnnxOptions, Precision, WeightPlacement
from kimi_convert.exporters.onnx.quantization import BLOCK
from kimi_convert.exporters.onnx.verification import check_file
from kimi_convert.exporters.onnx.weights import InplaceWeights
from kimi_convert.model.names.layout import match_checkpoint
from kimi_convert.model.tokenizer import tokenizer_files

MODEL_FILE = "model.onnx"
MAX_GRAPH_BYTES = 2**31 - 1  # of a protobuf message

_STORED = {Precision.FP32: "F32", Precision.FP16: "F16", Precision.BF16: "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxExportResult:
    """What was written."""

    output: Path
    options: OnnxOptions
    nodes: int
    functions: tuple[str, ...]  # domain::name
    files: tuple[tuple[str, int], ...]  # name, bytes

    def to_json(self) -> dict[str, object]:
        """Return the document that `export onnx --json` prints."""
        return {
            "output": str(self.output),
            "target": self.options.target.value,
            "opset": self.options.opset,
            "weights": self.options.weights.value,
            "mla": self.options.mla.value,
            "moe": self.options.moe_form.value,
            "precision": self.options.precision.value,
            "quantize": self.options.quantize.value if self.options.quantize else None,
            "last_logits": self.options.last_logits,
            "nodes": self.nodes,
            "functions": list(self.functions),
            "files": dict(self.files),
        }


def export_onnx(
    checkpoint: str | Path,
    output: str | Path,
    *,
    options: OnnxOptions | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> OnnxExportResult:
    """Write a checkpoint as an ONNX graph; what was there before stays as it is.

    Args:
        checkpoint: a folder of any supported architecture.
        output: a new or empty folder, which appears whole or not at all; with weights in place,
            the checkpoint's folder.
        options: the graph's form.
        on_progress: told of every tensor that is copied.

    Raises:
        UsageError: options exclude each other.
        ConfigError: config.json is missing or not valid.
        CheckpointError: the checkpoint is not whole, or cannot be used where it lies.
        OutputError: the output is taken, or is not the place that the options ask for.
        ResourceError: the disk is full or cannot be written.
        VerificationError: the ONNX checker refuses what was built.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    chosen = options or OnnxOptions()
    job = _open(checkpoint, chosen)
    if chosen.weights is WeightPlacement.INPLACE:
        return _export_inplace(job, output)
    return _export_copy(job, output, on_progress)


@dataclass(frozen=True, slots=True)
class _Job:
    """A checkpoint that is known to be whole, and what is wanted of it."""

    folder: Path
    config: ModelConfig
    index: CheckpointIndex
    stored_names: dict[str, str]
    options: OnnxOptions


def _open(checkpoint: Path, options: OnnxOptions) -> _Job:
    config = read_config(checkpoint)
    if config.model_type == BAILING_TYPE:
        raise ConfigError(
            "this format is not exported to ONNX yet",
            where=checkpoint,
            expected="kimi_linear or a teacher of one",
            found=config.model_type,
            hint="Convert to kimi_linear instead.",
        )
    if config.quantization is not None:
        raise CheckpointError(
            "a quantised checkpoint is not exported to ONNX as it is",
            where=checkpoint,
            expected="no quantization_config in config.json",
            found=config.quantization.get("quant_method", "quantization_config"),
            hint="`kimi-convert export safetensors` writes a plain copy; export that.",
        )
    if options.quantize is not None:
        _check_blocks(checkpoint, config)
    index = open_index(checkpoint)
    matched = match_checkpoint(config, index.tensors.values(), where=checkpoint)
    return _Job(checkpoint, config, index, dict(matched.stored_names), options)


def _check_blocks(checkpoint: Path, config: ModelConfig) -> None:
    """Refuse sizes that blocks do not divide; only the embedding and the experts need it."""
    sizes = {"hidden_size": config.hidden_size}
    if config.moe is not None:
        sizes["moe_intermediate_size"] = config.moe.intermediate_size
    for name, size in sizes.items():
        if size % BLOCK:
            raise CheckpointError(
                "this model cannot be quantised",
                where=checkpoint,
                expected=f"{name} to be a multiple of {BLOCK}",
                found=size,
                hint="Export without --quantize.",
            )


def _export_inplace(job: _Job, output: Path) -> OnnxExportResult:
    if not output.exists() or not output.samefile(job.folder):
        raise OutputError(
            "with weights in place, the graph is written into the checkpoint's folder",
            where=output,
            expected=job.folder,
            hint="Give the checkpoint's folder as output, or export with --weights copy.",
        )
    _refuse_links(job.index)
    store = InplaceWeights(job.index, job.stored_names, job.config)
    model = build_model(job.config, job.options, store)
    contents = {MODEL_FILE: serialized(model), **_companions(job)}
    with add_files(job.folder, tuple(contents)) as addition:
        for name, content in contents.items():
            addition.path(name).write_bytes(content)
        check_file(addition.path(MODEL_FILE))
    files = tuple((name, len(content)) for name, content in contents.items())
    return _result(job, job.folder, model, files)


def _companions(job: _Job) -> dict[str, bytes]:
    """Return the small files that stand beside a graph."""
    if not genai_runs(job.options):
        return {}
    document = genai_config(job.config, model_file=MODEL_FILE)
    return {GENAI_CONFIG_FILE: json.dumps(document, indent=2).encode() + b"\n"}


def _refuse_links(index: CheckpointIndex) -> None:
    """Refuse shards that are links: ONNX Runtime and the checker refuse to follow them."""
    for shard in index.shards.values():
        links = shard.path.stat().st_nlink
        if shard.path.is_symlink() or links > 1:
            raise CheckpointError(
                "a file of weights is a link, which ONNX does not allow for external data",
                where=shard.path,
                found=f"a link to {shard.path.resolve()}"
                if shard.path.is_symlink()
                else f"a file with {links} names",
                hint="Export with --weights copy, or copy the checkpoint into a folder of plain "
                "files, as `hf download --local-dir` or `cp -rL` do.",
            )


def _export_copy(job: _Job, output: Path, on_progress: ProgressCallback) -> OnnxExportResult:
    store = CopiedWeights(
        job.index, job.stored_names, job.config, dtype=_STORED[job.options.precision]
    )
    model = build_model(job.config, job.options, store)
    total, done = sum(part.source_bytes for part in store.planned), 0

    def on_tensor(part: PlannedBytes) -> None:
        nonlocal done
        on_progress(ProgressEvent("writing weights", done, total, "bytes", part.name))
        done += part.source_bytes

    with open_output(output, source=job.folder) as target:
        target.require_space(store.nbytes)
        with CheckpointReader(job.index) as reader:
            chunks = store.file_chunks(reader, on_tensor)
            target.write_chunks(DATA_FILE, chunks, nbytes=store.nbytes)
        on_progress(ProgressEvent("writing weights", total, total, "bytes"))
        target.write_bytes(MODEL_FILE, serialized(model))
        check_file(target.unfinished_path(MODEL_FILE))
        for name, content in _companions(job).items():
            target.write_bytes(name, content)
        for name in tokenizer_files(job.folder):
            target.copy_file(job.folder / name)
        files = tuple((file.name, file.nbytes) for file in target.files)
        return _result(job, target.folder, model, files)


def serialized(model: ir.Model) -> bytes:
    """Return the bytes of model.onnx; weights are named there, not held.

    Raises:
        CheckpointError: the graph alone is larger than a protobuf message can be.
    """
    proto = ir.to_proto(model)
    nbytes = proto.ByteSize()
    if nbytes > MAX_GRAPH_BYTES:
        raise CheckpointError(
            "the graph is too large for one file, without any weight",
            expected=f"at most {sized(MAX_GRAPH_BYTES)}",
            found=sized(nbytes),
            hint="The config has too many layers or experts for ONNX.",
        )
    return proto.SerializeToString()


def _result(
    job: _Job, output: Path, model: ir.Model, files: tuple[tuple[str, int], ...]
) -> OnnxExportResult:
    return OnnxExportResult(
        output=output,
        options=job.options,
        nodes=len(model.graph),
        functions=tuple(f"{domain}::{name}" for domain, name, _ in model.functions),
        files=files,
    )
