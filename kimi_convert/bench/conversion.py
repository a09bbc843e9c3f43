"""How fast `convert` is beside `cp`, what it holds in memory, and what peers take for the same bytes.

    python -m kimi_convert.bench.conversion speed [--fp8] [--layers N] [--pairs N] [--jobs N] [--rest S]
                                                  [--source DISK] [--released]
    python -m kimi_convert.bench.conversion memory MODEL [--whole]
    python -m kimi_convert.bench.conversion plan MODEL
    python -m kimi_convert.bench.conversion shared MODEL
    python -m kimi_convert.bench.conversion peers [--layers N] [--mergekit FILE]

`speed` copies and converts the same bytes in turn, and gives the ratio of each pair: a busy machine
slows both. Both begin some seconds after the last output was removed: a virtual machine gives free
memory back to its host, and what writes before that finds faster memory. `memory` and `plan` take
whole released models, right-shaped, their weights holes (`released_shapes`), but for the first 10 GB
where memory is measured; `memory` converts one file of weights of each kind and deletes it, since few
disks hold an output of terabytes, or with --whole runs the command on all of it. `peers` rewrites the
same bytes with other programs. `shared` tells which part of an output needs no room on a disk that
shares blocks, and `speed --source DISK` reads from another disk, so that nothing is shared. All work in
--folder, and remove what they wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from kimi_convert.bench.conversion_peers import measure_peers, measure_written
from kimi_convert.bench.process_cost import Cost, run_measured
from kimi_convert.bench.released_files import released_files
from kimi_convert.bench.released_shapes import MODELS, write_shaped_checkpoint
from kimi_convert.checkpoints.byte_size import parse_byte_size
from kimi_convert.config.output_format import OutputFormat, TargetDtype
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion import plan_conversion
from kimi_convert.errors import KimiConvertError, ResourceError

_PROGRAM = "python -m kimi_convert.bench.conversion"
_FIRST_LAYERS = 10**10  # bytes that are real where memory is measured: the first layers
_WHOLE = 10**18  # more bytes than any checkpoint here: all of them real


def measure_speed(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Copy and convert a checkpoint of real bytes in turn."""
    document = {**MODELS["moonlight"], "num_hidden_layers": options.layers}
    if options.fp8:
        document["quantization_config"] = MODELS["kimi-k2"]["quantization_config"]
    files = released_files("moonlight", document) if options.released else None
    with tempfile.TemporaryDirectory(
        prefix="bench-source-", dir=options.source or folder
    ) as place:
        source = Path(place) / "source"
        write_shaped_checkpoint(source, document, filled_bytes=_WHOLE, files=files)
        return _speed(source, folder / "output", options)


def _speed(source: Path, output: Path, options: argparse.Namespace) -> dict[str, object]:
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    convert = _convert(source, output, "--jobs", str(options.jobs))
    pairs: list[dict[str, float]] = []
    for _ in range(options.pairs):
        time.sleep(options.rest)
        copied = _removing(output, ("sh", "-c", _COPY, "sh", source, output))
        time.sleep(options.rest)
        converted = _removing(output, convert)
        pairs.append(
            {
                "cp_seconds": copied.seconds,
                "convert_seconds": converted.seconds,
                "ratio": copied.seconds / converted.seconds,
                "cp_processor_seconds": copied.processor_seconds,
                "convert_processor_seconds": converted.processor_seconds,
                "peak_bytes": converted.peak_bytes,
            }
        )
    return {
        "source_bytes": nbytes,
        "jobs": options.jobs,
        "pairs": pairs,
        "median_ratio": sorted(pair["ratio"] for pair in pairs)[(len(pairs) - 1) // 2],
    }


_COPY = 'cp -r "$1" "$2" && sync "$2"/*'


def measure_memory(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Convert a whole model, or one file of each kind of it, in a process of its own."""
    document = MODELS[options.model]
    source = write_shaped_checkpoint(folder / "source", document, filled_bytes=_FIRST_LAYERS)
    if options.whole:
        cost = _removing(folder / "output", _convert(source, folder / "output"))
        return {"model": options.model, "seconds": cost.seconds, "peak_bytes": cost.peak_bytes}
    code = (sys.executable, "-m", "kimi_convert.bench.sampled_conversion")
    cost = run_measured((*code, source, folder / "output"))
    return {"model": options.model, **json.loads(cost.stdout), "peak_bytes": cost.peak_bytes}


def measure_plan(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Plan and inspect a whole model."""
    source = write_shaped_checkpoint(folder / "source", MODELS[options.model])
    found: dict[str, object] = {"model": options.model}
    for command in ("plan", "inspect"):
        cost = run_measured((sys.executable, "-m", "kimi_convert", command, source))
        found[command] = {
            "seconds": cost.seconds,
            "processor_seconds": cost.processor_seconds,
            "peak_bytes": cost.peak_bytes,
        }
    return found


def measure_shared(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Plan a whole model, its tensors in files as they are released, in files of several sizes."""
    document = MODELS[options.model]
    files = released_files(options.model, document)
    source = write_shaped_checkpoint(folder / "source", document, files=files)
    dtype = TargetDtype.FP8 if "quantization_config" in document else TargetDtype.SOURCE
    found: dict[str, object] = {}
    for size in ("1GB", "2GB", "5GB"):
        plan = plan_conversion(
            source,
            Recipe(),
            max_shard_bytes=parse_byte_size(size),
            output_format=OutputFormat(dtype=dtype),
        )
        found[size] = {
            "files": len(plan.shards.shards),
            "written_bytes": plan.write_bytes,
            "copied": round(plan.copied_bytes / plan.write_bytes, 3),
            "shared": round(plan.shareable().nbytes / plan.write_bytes, 3),
        }
    return {"model": options.model, "dtype": str(dtype), **found}


def measure_beside_peers(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Rewrite the same bytes with other programs."""
    document = {**MODELS["moonlight"], "num_hidden_layers": options.layers}
    source = write_shaped_checkpoint(folder / "source", document, filled_bytes=_WHOLE)
    output = folder / "output"
    ours = measure_written(_convert(source, output), output)
    costs = {"kimi-convert": ours, **measure_peers(source, output, options.mergekit)}
    nbytes = sum(path.stat().st_size for path in source.iterdir())
    return {
        "source_bytes": nbytes,
        "programs": {
            name: {
                "seconds": cost.seconds,
                "processor_seconds": cost.processor_seconds,
                "peak_bytes": cost.peak_bytes,
                "written_bytes": written,
            }
            for name, (cost, written) in costs.items()
        },
    }


def _convert(source: Path, output: Path, *more: str) -> tuple[object, ...]:
    program = (sys.executable, "-m", "kimi_convert", "convert")
    return (*program, source, output, "--no-text", "--quiet", *more)


def _removing(output: Path, command: Sequence[object]) -> Cost:
    """Run a command, and remove the folder that it wrote."""
    import shutil

    try:
        return run_measured(command)
    finally:
        shutil.rmtree(output, ignore_errors=True)


_MEASURES: Mapping[str, Callable[[Path, argparse.Namespace], dict[str, object]]] = (
    MappingProxyType(
        {
            "speed": measure_speed,
            "memory": measure_memory,
            "plan": measure_plan,
            "shared": measure_shared,
            "peers": measure_beside_peers,
        }
    )
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one measurement and print it as JSON; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-conversion-", dir=options.folder) as folder:
            found = _MEASURES[options.measure](Path(folder), options)
    except OSError as error:
        sys.stderr.write(f"error: cannot measure in {options.folder}: {error.strerror}\n")
        return ResourceError.exit_code
    except KimiConvertError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="Measure conversions of large checkpoints."
    )
    parser.add_argument("--folder", type=Path, help="where there is room; default: temporary")
    measures = parser.add_subparsers(dest="measure", required=True)
    speed = measures.add_parser("speed", help="beside cp and fsync of the same bytes")
    speed.add_argument("--layers", type=int, default=7, help="7 of Moonlight's make 8.7 GB")
    speed.add_argument("--fp8", action="store_true", help="from FP8 blocks to bf16")
    speed.add_argument("--pairs", type=int, default=3)
    speed.add_argument("--jobs", type=int, default=1)
    speed.add_argument("--source", type=Path, help="folder on another disk, for the source")
    speed.add_argument("--released", action="store_true", help="a file for each layer")
    speed.add_argument("--rest", type=float, default=10, help="seconds before each program")
    shaped = {name: measures.add_parser(name) for name in ("memory", "plan", "shared")}
    for parser_of in shaped.values():
        parser_of.add_argument("model", choices=sorted(MODELS))
    shaped["memory"].add_argument("--whole", action="store_true", help="every file, not a sample")
    peers = measures.add_parser("peers", help="mergekit, and transformers' save_pretrained")
    peers.add_argument("--layers", type=int, default=3)
    peers.add_argument("--mergekit", type=Path, help="mergekit-yaml of mergekit 0.1.5")
    return parser


if __name__ == "__main__":
    sys.exit(main())
