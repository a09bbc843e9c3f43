"""Measure `kimi-convert export onnx` on a checkpoint of Kimi-Linear-48B's shape.

    python -m kimi_convert.bench.onnx_export [--weights inplace|copy|int4] [--layers N] [--json]

The checkpoint has the config, names and shapes of Kimi-Linear-48B-A3B, but its weights are holes: 98 GB
to a reader, next to nothing on disk. With copied weights the output is as large, and real: give fewer
layers. Nothing here imports torch: Linux counts what a process was before `exec` into its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from kimi_convert.bench.released_shapes import write_shaped_checkpoint
from kimi_convert.errors import KimiConvertError, VerificationError

# config.json of https://huggingface.co/moonshotai/Kimi-Linear-48B-A3B-Instruct, without its code
# references and its layer lists, which `document_of` makes: every fourth layer and the last are MLA.
KIMI_LINEAR: Mapping[str, object] = MappingProxyType(
    {
        "architectures": ["KimiLinearForCausalLM"],
        "bos_token_id": 163584,
        "dtype": "bfloat16",
        "eos_token_id": 163586,
        "first_k_dense_replace": 1,
        "head_dim": 72,
        "hidden_act": "silu",
        "hidden_size": 2304,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "kv_lora_rank": 512,
        "mla_use_nope": True,
        "model_max_length": 1048576,
        "model_type": "kimi_linear",
        "moe_intermediate_size": 1024,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_attention_heads": 32,
        "num_expert_group": 1,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_hidden_layers": 27,
        "num_key_value_heads": 32,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "pad_token_id": 163839,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.446,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_grouped_topk": True,
        "v_head_dim": 128,
        "vocab_size": 163840,
    }
)
HOW: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "inplace": ("--weights", "inplace"),
        "copy": ("--precision", "bf16"),
        "int4": ("--quantize", "int4"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCost:
    """What one export took, the start of Python included."""

    weights: str
    layers: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int  # resident set of the whole process
    graph_bytes: int
    written_bytes: int


def document_of(layers: int) -> dict[str, object]:
    """Return config.json with so many layers."""
    mla = [n for n in range(1, layers + 1) if n % 4 == 0 or n == layers]
    lists = {
        "full_attn_layers": mla,
        "kda_layers": [n for n in range(1, layers + 1) if n not in mla],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    }
    return {**KIMI_LINEAR, "num_hidden_layers": layers, "linear_attn_config": lists}


def measure_export(folder: Path, *, layers: int, weights: str) -> ExportCost:
    """Export a sparse checkpoint in a new process and measure it.

    Args:
        folder: empty; holds checkpoint and output afterwards.
        layers: of the model.
        weights: a key of `HOW`.

    Raises:
        VerificationError: the export failed; what it said is on stderr.
    """
    checkpoint, output = folder / "checkpoint", folder / "onnx"
    write_shaped_checkpoint(checkpoint, document_of(layers))
    how = (
        ("--weights", "inplace") if weights == "inplace" else (str(output), "--precision", "bf16")
    )
    command = (sys.executable, "-m", "kimi_convert", "export", "onnx", str(checkpoint), *how)
    started = time.monotonic()
    process = subprocess.Popen((*command, *HOW[weights], "--quiet"))  # noqa: S603  (our own program)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise VerificationError(
            "the export that was to be measured failed",
            where=folder,
            expected="exit code 0",
            found=process.returncode,
        )
    written = checkpoint if weights == "inplace" else output
    names = ("model.onnx", "model.onnx.data", "genai_config.json")
    sizes = {n: (written / n).stat().st_size for n in names if (written / n).exists()}
    return ExportCost(
        weights=weights,
        layers=layers,
        seconds=time.monotonic() - started,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        graph_bytes=sizes["model.onnx"],
        written_bytes=sum(sizes.values()),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_convert.bench.onnx_export",
        description="Measure time and memory of `export onnx` at Kimi-Linear-48B's shape.",
    )
    parser.add_argument("--weights", choices=tuple(HOW), default="inplace")
    parser.add_argument("--layers", type=int, default=KIMI_LINEAR["num_hidden_layers"])
    parser.add_argument("--folder", type=Path, help="where there is room; default: temporary")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    if options.layers < 2:
        parser.error("--layers is 2 or more")
    try:
        with tempfile.TemporaryDirectory(prefix="bench-onnx-", dir=options.folder) as folder:
            cost = measure_export(Path(folder), layers=options.layers, weights=options.weights)
    except KimiConvertError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    text = (
        f"{cost.seconds:.2f} s, {cost.cpu_seconds:.2f} s of CPU time,"
        f" peak memory {cost.peak_bytes / 1e6:.0f} MB\n"
        f"graph {cost.graph_bytes / 1e6:.2f} MB, {cost.written_bytes / 1e6:.2f} MB written"
    )
    sys.stdout.write((json.dumps(asdict(cost)) if options.json else text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
