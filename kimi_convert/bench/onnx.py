"""Measure decoding on a CPU: exported graphs in ONNX Runtime, our torch model, transformers.

    python -m kimi_convert.bench.onnx [CHECKPOINT] [--tokens N] [--rounds N] [--json]

One sequence, one thread, greedy. Every round runs all of them one after the other, so that a busy
machine slows them alike; what is reported is tokens per second of CPU time, the median over rounds, and
how many times our torch model's that is. Without a checkpoint, the example is converted, with no text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.config.huggingface import read_config
from kimi_convert.conversion import convert_checkpoint
from kimi_convert.errors import KimiConvertError, VerificationError
from kimi_convert.exporters.onnx.export import export_onnx
from kimi_convert.exporters.onnx.options import (
    CustomBody,
    MlaForm,
    MoeForm,
    OnnxOptions,
    Quantization,
    Target,
)
from kimi_convert.exporters.onnx.session import OnnxSession
from kimi_convert.model.cache import new_cache
from kimi_convert.model.loading import load_model

GRAPHS: Mapping[str, OnnxOptions] = MappingProxyType(
    {
        "ort": OnnxOptions(),
        "ort, latent MLA": OnnxOptions(mla=MlaForm.LATENT),
        "ort, active experts": OnnxOptions(moe=MoeForm.ACTIVE),
        "ort, int8": OnnxOptions(quantize=Quantization.INT8),
        "ort, int4": OnnxOptions(quantize=Quantization.INT4),
        "custom, nested": OnnxOptions(target=Target.CUSTOM, custom_body=CustomBody.NESTED),
        "custom, portable": OnnxOptions(target=Target.CUSTOM),
        "onnx27": OnnxOptions(target=Target.ONNX27),
    }
)
TORCH, TRANSFORMERS = "torch, ours", "transformers"

_PROMPT_TOKENS = 128
_Round = Callable[[], float]  # -> seconds of CPU time


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast one of them decodes."""

    who: str
    tokens_per_second: float  # of CPU time; median over rounds
    times_torch: float  # median over rounds of the ratio within a round

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return {
            "who": self.who,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "times_torch": round(self.times_torch, 2),
        }


def measure(checkpoint: Path, work: Path, *, tokens: int, rounds: int) -> list[Speed]:
    """Measure every graph, our model and, if it is installed, transformers.

    Args:
        checkpoint: a Kimi-Linear hybrid.
        work: an empty folder for the graphs.
        tokens: decoded in each round.
        rounds: how many.

    Raises:
        KimiConvertError: the checkpoint cannot be exported or run.
    """
    torch.set_num_threads(1)
    vocab_size = read_config(checkpoint).vocab_size
    prompt = np.arange(_PROMPT_TOKENS, dtype=np.int64)[None] % vocab_size
    runners: dict[str, _Round] = {TORCH: _torch(checkpoint, prompt, tokens)}
    for number, (name, options) in enumerate(GRAPHS.items()):
        export_onnx(checkpoint, work / str(number), options=options)
        runners[name] = _graph(OnnxSession(work / str(number), threads=1), prompt, tokens)
    peer = _Transformers(checkpoint, tokens) if find_spec("transformers") else None
    if peer is not None:
        runners[TRANSFORMERS] = peer.run
    try:
        seconds = [{name: run() for name, run in runners.items()} for _ in range(rounds)]
    finally:
        if peer is not None:
            peer.close()
    return [_speed(name, seconds, tokens) for name in runners]


def _speed(name: str, seconds: Sequence[Mapping[str, float]], tokens: int) -> Speed:
    return Speed(
        who=name,
        tokens_per_second=tokens / statistics.median(one[name] for one in seconds),
        times_torch=statistics.median(one[TORCH] / one[name] for one in seconds),
    )


def _torch(checkpoint: Path, prompt: np.ndarray, tokens: int) -> _Round:
    model = load_model(checkpoint)

    @torch.inference_mode()
    def run() -> float:
        cache = new_cache(model.config, 1, dtype=torch.float32)
        token = model(torch.from_numpy(prompt), cache)[:, -1:].argmax(-1)
        started = time.process_time()
        for _ in range(tokens):
            token = model(token, cache)[:, -1:].argmax(-1)
        return time.process_time() - started

    return run


def _graph(session: OnnxSession, prompt: np.ndarray, tokens: int) -> _Round:
    def run() -> float:
        states = session.new_states(1)
        token = session.run(prompt, states)[:, -1:].argmax(-1)
        started = time.process_time()
        for _ in range(tokens):
            token = session.run(token, states)[:, -1:].argmax(-1)
        return time.process_time() - started

    return run


class _Transformers:
    """The process that decodes with transformers."""

    def __init__(self, checkpoint: Path, tokens: int) -> None:
        """Start it."""
        module = "kimi_convert.bench.transformers_decode"
        command = (sys.executable, "-m", module, str(checkpoint))
        self._process = subprocess.Popen(  # noqa: S603  (our own program)
            (*command, str(_PROMPT_TOKENS), str(tokens)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self) -> float:
        """Run one round.

        Raises:
            VerificationError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise VerificationError(
                "transformers does not run this checkpoint",
                found=f"its process ended with {self._process.poll()}",
            ) from error

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_convert.bench.onnx",
        description="Measure decoding on a CPU: ONNX Runtime, our torch model, transformers.",
    )
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="a hybrid; default: the example's"
    )
    parser.add_argument("--tokens", type=int, default=128, help="decoded in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    if options.tokens < 1 or options.rounds < 1:
        parser.error("--tokens and --rounds are 1 or more")
    try:
        with tempfile.TemporaryDirectory(prefix="bench-onnx-") as folder:
            work = Path(folder)
            checkpoint = options.checkpoint or work / "hybrid"
            if options.checkpoint is None:
                convert_checkpoint(example_checkpoint(), checkpoint)
            speeds = measure(checkpoint, work, tokens=options.tokens, rounds=options.rounds)
    except KimiConvertError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    lines = [f"{s.who:22}{s.tokens_per_second:9.1f}{s.times_torch:9.2f}" for s in speeds]
    text = "\n".join((f"{'one thread':22}{'tokens/s':>9}{'x torch':>9}", *lines))
    document = {"prompt_tokens": _PROMPT_TOKENS, "speeds": [s.to_json() for s in speeds]}
    sys.stdout.write((json.dumps(document) if options.json else text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
