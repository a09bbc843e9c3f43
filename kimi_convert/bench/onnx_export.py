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

from kimi_convert.bench.kimi_linear_48b import RELEASED_LAYERS, kimi_linear_document
from kimi_convert.bench.released_shapes import write_shaped_checkpoint
from kimi_convert.errors import KimiConvertError, VerificationError

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
    write_shaped_checkpoint(checkpoint, kimi_linear_document(layers))
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
    parser.add_argument("--layers", type=int, default=RELEASED_LAYERS)
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
