"""Measure the memory that `kimi-convert validate` takes on a checkpoint of Kimi-Linear-48B's shape.

    python -m kimi_convert.bench.validate_memory [--folder DIR] [--layers N] [--tokens N]

The checkpoint has the config, names and shapes of Kimi-Linear-48B-A3B, but its weights are holes:
98 GB to a reader, next to nothing on disk. Tokens are random ids. Every pass runs: integrity, the
four forms, and the loss. Zeros all score alike, so every token chooses the same experts: memory is
that of real weights, since all experts of a layer are loaded, but time is that of fewer products.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kimi_convert.bench.kimi_linear_48b import RELEASED_LAYERS, kimi_linear_document
from kimi_convert.bench.process_cost import wait_for_peak
from kimi_convert.bench.released_shapes import write_shaped_checkpoint
from kimi_convert.config.huggingface import parse_config
from kimi_convert.errors import KimiConvertError, VerificationError


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateMemory:
    """What one validation took."""

    checkpoint_bytes: int
    tokens: int
    peak_bytes: int  # resident, the whole process
    seconds: float
    estimate: str  # what was said first

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return asdict(self)


def measure_validation(
    folder: Path, document: Mapping[str, object], *, tokens: int
) -> ValidateMemory:
    """Validate a sparse checkpoint in a new process and measure it.

    Args:
        folder: empty; holds the checkpoint afterwards.
        document: its config.json.
        tokens: of the text, in two sequences.

    Raises:
        ConfigError: the config is not valid.
        VerificationError: the validation failed; what it said is in the message.
    """
    checkpoint, text = folder / "checkpoint", folder / "text.jsonl"
    write_shaped_checkpoint(checkpoint, document)
    vocab_size = parse_config(document).vocab_size
    ids = [random.Random(0).randrange(vocab_size) for _ in range(tokens + 1)]  # noqa: S311
    text.write_text(json.dumps({"token_ids": ids}), encoding="utf-8")
    sizes = ("--sequence-length", str(tokens // 2), "--max-tokens", str(tokens))
    command = (sys.executable, "-m", "kimi_convert", "validate", str(checkpoint))
    errors = folder / "errors.txt"
    started = time.perf_counter()
    with errors.open("wb") as said:
        process = subprocess.Popen(  # noqa: S603  (our own program)
            [*command, "--text", str(text), "--dtype", "bfloat16", *sizes],
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        peak_bytes = wait_for_peak(process)
    lines = errors.read_text(encoding="utf-8").splitlines()
    if process.returncode:
        raise VerificationError(
            "the validation that was to be measured failed",
            where=folder,
            expected="exit code 0",
            found=f"{process.returncode}: {lines[-1:]}",
        )
    return ValidateMemory(
        checkpoint_bytes=sum(path.stat().st_size for path in checkpoint.iterdir()),
        tokens=tokens,
        peak_bytes=peak_bytes,
        seconds=time.perf_counter() - started,
        estimate=next((line for line in lines if line.startswith("Estimate")), ""),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_convert.bench.validate_memory",
        description="Measure memory and time of `validate` on a checkpoint of 48B parameters.",
    )
    parser.add_argument("--folder", type=Path, help="for the holes; default: temporary")
    parser.add_argument("--layers", type=int, default=RELEASED_LAYERS)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="validate-memory-", dir=options.folder) as folder:
            document = kimi_linear_document(options.layers)
            measured = measure_validation(Path(folder), document, tokens=options.tokens)
    except KimiConvertError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(json.dumps(measured.to_json(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
