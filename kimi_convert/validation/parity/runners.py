"""What can run a model: our reference in its forms, independent libraries, written artifacts.

A runner gives one trace or several, a row of the report each. What depends on an implementation's
name stands in the tables at the end of this file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import CONFIG_FILE
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.runtimes import runtime_support
from kimi_convert.kernels.backend import Backend
from kimi_convert.model.kda import KdaForm
from kimi_convert.model.numerics import SERVED, TRANSFORMERS, Numerics
from kimi_convert.validation.bounds import coarsest
from kimi_convert.validation.parity.oracles.process import (
    DECODE,
    PREFILL,
    OracleRequest,
    ask_oracle,
)
from kimi_convert.validation.parity.torch_model import (
    TorchRun,
    continue_greedily,
    single_tokens,
    trace_checkpoint,
    uneven_pieces,
)
from kimi_convert.validation.parity.trace import Trace

_ORACLES = "kimi_convert.validation.parity.oracles"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What every runner is given."""

    folder: Path
    config: ModelConfig
    tokens: torch.Tensor  # [B, T] int64
    prompt: tuple[int, ...]
    new_tokens: int  # of the greedy continuation; 0 for none
    follow: Callable[[Numerics], Trace]  # the reference under given numerics
    on_progress: ProgressCallback


class Runner(Protocol):
    """Runs a model in one way, or in a few that share a process."""

    @property
    def name(self) -> str:
        """What `--against` calls it."""
        ...

    @property
    def what(self) -> str:
        """A line for people."""
        ...

    @property
    def numerics(self) -> Numerics:
        """Its choices where implementations disagree."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of activations, and of weights that were rounded."""
        ...

    def why_not(self, problem: Problem) -> str:
        """Return what keeps it from running here; empty if nothing does."""
        ...

    def run(self, problem: Problem) -> Iterator[tuple[str, Trace]]:
        """Yield the name of a row, and its trace."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRunner:
    """Our reference model, on the checkpoint or on an artifact."""

    name: str
    what: str
    setting: TorchRun
    artifact: Path | None = None
    rounded: torch.dtype | None = None  # what the artifact's weights were rounded to
    continues: bool = False

    @property
    def numerics(self) -> Numerics:
        """As the setting says."""
        return self.setting.numerics

    @property
    def dtype(self) -> torch.dtype:
        """The coarser of the activations' and what weights were rounded to."""
        return coarsest(filter(None, (self.setting.dtype, self.rounded)))

    def why_not(self, problem: Problem) -> str:
        """A recurrent form needs KDA layers, Triton a GPU."""
        if self.setting.kda_form is KdaForm.RECURRENT and not problem.config.kda_layers:
            return "the model has no KDA layers" if self.name == "recurrent" else ""
        if self.setting.backend is Backend.TRITON and not torch.cuda.is_available():
            return "torch finds no GPU here"
        return ""

    def run(self, problem: Problem) -> Iterator[tuple[str, Trace]]:
        """Yield one trace."""
        folder = self.artifact or problem.folder
        trace = trace_checkpoint(
            folder,
            problem.tokens,
            self.setting,
            follow=problem.follow(self.numerics),
            label=self.name,
            on_progress=problem.on_progress,
        )
        greedy = None
        if self.continues and problem.new_tokens:
            greedy = continue_greedily(folder, problem.prompt, problem.new_tokens, self.setting)
        yield self.name, Trace(trace.values, greedy, trace.rerouted)


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
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            return f"{' and '.join(missing)} not installed; pip install 'kimi-convert[oracles]'"
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
        request = OracleRequest(
            folder=str(problem.folder.resolve()),
            tokens=problem.tokens.tolist(),
            forms=[PREFILL, DECODE],
            prompt=list(problem.prompt),
            new_tokens=problem.new_tokens,
        )
        problem.on_progress(ProgressEvent(self.name, 0, 1, "runs"))
        traces = ask_oracle(f"{_ORACLES}.{self.module}", request)
        problem.on_progress(ProgressEvent(self.name, 1, 1, "runs"))
        for form, trace in traces.items():
            kept = trace if form == PREFILL else Trace(trace.values)
            yield f"{self.name}, {form}", kept


REFERENCE = "torch"
RUNNERS: tuple[Runner, ...] = (
    TorchRunner(
        name="recurrent",
        what="our model, recurrent form of KDA",
        setting=TorchRun(kda_form=KdaForm.RECURRENT),
    ),
    TorchRunner(
        name="pieces",
        what="our model, prefill in pieces off chunk boundaries",
        setting=TorchRun(pieces=uneven_pieces),
    ),
    TorchRunner(
        name="decode",
        what="our model, token by token with a cache",
        setting=TorchRun(kda_form=KdaForm.RECURRENT, pieces=single_tokens),
    ),
    TorchRunner(
        name="float64",
        what="our model in fp64",
        setting=TorchRun(dtype=torch.float64),
        continues=True,
    ),
    TorchRunner(
        name="bfloat16",
        what="our model in bf16",
        setting=TorchRun(dtype=torch.bfloat16),
    ),
    TorchRunner(
        name="triton",
        what="our model on Triton kernels, on a GPU",
        setting=TorchRun(backend=Backend.TRITON, device="cuda"),
    ),
    OracleRunner(
        name="transformers",
        what="transformers' own class",
        module="transformers_native",
        packages=("transformers",),
        runtime="transformers (native, 5.23 and later)",
        numerics=TRANSFORMERS,
        others=("deepseek_v3", "kimi_k2"),
    ),
    OracleRunner(
        name="mlx-lm",
        what="mlx-lm on the CPU",
        module="mlx_lm_model",
        packages=("mlx", "mlx_lm"),
        runtime="mlx-lm",
        numerics=Numerics(o_norm_eps=None),
        config_fields=("rope_theta",),
    ),
)


def artifact_runner(artifact: Path, *, rounded: torch.dtype | None) -> TorchRunner:
    """Return what runs a folder of safetensors.

    Args:
        artifact: the folder.
        rounded: the coarsest dtype that its weights were rounded to; None if none were.
    """
    stored = "weights as in the checkpoint" if rounded is None else f"weights in {rounded}"
    return TorchRunner(
        name=artifact.name or str(artifact),
        what=f"our model on {artifact}, {stored.replace('torch.', '')}",
        setting=TorchRun(numerics=SERVED),
        artifact=artifact,
        rounded=rounded,
        continues=True,
    )
