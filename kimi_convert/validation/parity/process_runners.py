"""Implementations that run in a process of their own: libraries on the checkpoint, or on a graph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from kimi_convert.config.huggingface import CONFIG_FILE
from kimi_convert.config.progress import ProgressEvent
from kimi_convert.conversion.runtimes import runtime_support
from kimi_convert.model.numerics import SERVED, Numerics
from kimi_convert.validation.parity.oracles.process import (
    DECODE,
    PREFILL,
    OracleRequest,
    ask_oracle,
)
from kimi_convert.validation.parity.problem import Problem
from kimi_convert.validation.parity.trace import Trace

_ORACLES = "kimi_convert.validation.parity.oracles"


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleRunner:
    """An independent library, in a process of its own; a prefill, and a decode with a cache."""

    name: str
    what: str
    module: str
    packages: tuple[str, ...]
    runtime: str  # its name in the table of runtimes
    numerics: Numerics
    config_fields: tuple[str, ...] = ()  # that it needs in config.json
    others: tuple[str, ...] = ()  # model types besides kimi_linear
    dtype: torch.dtype = torch.float32

    def why_not(self, problem: Problem) -> str:
        """It may not be installed, or not load such a model."""
        missing = _missing(self.packages, extra="oracles")
        if missing:
            return missing
        config = problem.config
        if config.model_type != "kimi_linear":
            known = config.model_type in self.others
            return "" if known else f"no {config.model_type} model there"
        reasons = [
            reason
            for support in runtime_support(config)
            if support.runtime == self.runtime
            for reason in support.reasons
        ]
        document = json.loads((problem.folder / CONFIG_FILE).read_text(encoding="utf-8"))
        absent = [field for field in self.config_fields if field not in document]
        reasons += [f"needs {field} in config.json" for field in absent]
        return "; ".join(reasons)

    def run(self, problem: Problem) -> Iterator[tuple[str, Trace]]:
        """Yield a prefill and a decode; they share the continuation."""
        yield from _asked(self.name, self.module, problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaRunner:
    """flash-linear-attention's KDA layer in our model, on a GPU, in a process of its own."""

    name: str = "fla"
    what: str = "our model, its KDA mixers flash-linear-attention's layers, on a GPU"
    module: str = "fla_layer"
    numerics: Numerics = SERVED  # unit norm and sigmoid as its kernels do, eps as it is given
    dtype: torch.dtype = torch.float32

    def why_not(self, problem: Problem) -> str:
        """It needs a GPU, layers to exchange, and the package that has the layer."""
        if not problem.config.kda_layers:
            return "the model has no KDA layers"
        if not torch.cuda.is_available():
            return "torch finds no GPU here"
        # Without an import, which takes seconds; fla-core alone is an `fla` without layers.
        spec = find_spec("fla")
        places = [] if spec is None else spec.submodule_search_locations or []
        if not any((Path(place) / _FLA_LAYER).is_file() for place in places):
            return "fla.layers not installed; pip install flash-linear-attention"
        return ""

    def run(self, problem: Problem) -> Iterator[tuple[str, Trace]]:
        """Yield a prefill and a decode; they share the continuation."""
        yield from _asked(self.name, self.module, problem)


_FLA_LAYER = Path("layers", "kda.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRunner:
    """Something that runs an exported graph, in a process of its own."""

    name: str
    what: str
    module: str
    packages: tuple[str, ...]
    artifact: Path
    numerics: Numerics = SERVED  # what the exporter writes
    dtype: torch.dtype = torch.float32

    def why_not(self, problem: Problem) -> str:
        """It may not be installed."""
        return _missing(self.packages, extra="onnx")

    def run(self, problem: Problem) -> Iterator[tuple[str, Trace]]:
        """Yield a row per form that it has; they share the continuation."""
        yield from _asked(self.name, self.module, problem, artifact=self.artifact)


def _missing(packages: tuple[str, ...], *, extra: str) -> str:
    missing = [package for package in packages if find_spec(package) is None]
    if not missing:
        return ""
    return f"{' and '.join(missing)} not installed; pip install 'kimi-convert[{extra}]'"


def _asked(
    name: str, module: str, problem: Problem, *, artifact: Path | None = None
) -> Iterator[tuple[str, Trace]]:
    request = OracleRequest(
        folder=str(problem.folder.resolve()),
        artifact="" if artifact is None else str(artifact.resolve()),
        tokens=problem.tokens.tolist(),
        forms=[PREFILL, DECODE],
        prompt=list(problem.prompt),
        new_tokens=problem.new_tokens,
    )
    problem.on_progress(ProgressEvent(name, 0, 1, "runs"))
    traces = ask_oracle(f"{_ORACLES}.{module}", request)
    problem.on_progress(ProgressEvent(name, 1, 1, "runs"))
    for number, (form, trace) in enumerate(traces.items()):
        yield f"{name}, {form}", trace if number == 0 else Trace(trace.values, dtype=trace.dtype)
