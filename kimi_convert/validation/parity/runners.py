"""What can run a model: our reference in its forms, independent libraries, written artifacts.

A runner gives one trace or several, a row of the report each. What depends on an implementation's
name stands in the tables below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_convert.kernels.backend import Backend
from kimi_convert.model.kda import KdaForm
from kimi_convert.model.numerics import SERVED, TRANSFORMERS, Numerics
from kimi_convert.validation.bounds import coarsest
from kimi_convert.validation.parity.problem import Problem, Runner
from kimi_convert.validation.parity.process_runners import (
    FlaRunner,
    GraphRunner,
    OracleRunner,
)
from kimi_convert.validation.parity.torch_model import (
    TorchRun,
    continue_greedily,
    single_tokens,
    trace_checkpoint,
    uneven_pieces,
)
from kimi_convert.validation.parity.trace import Trace


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
        yield self.name, Trace(trace.values, greedy, rerouted=trace.rerouted)


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
        continues=True,
    ),
    FlaRunner(),
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


# Of an exported graph: what runs it, the module, and the packages that it needs.
_GRAPH_RUNNERS = (
    ("ONNX Runtime", "onnx_runtime", ("onnx", "onnxruntime")),
    ("ONNX's reference evaluator", "onnx_reference", ("onnx",)),
    ("onnxruntime-genai", "onnx_genai", ("onnxruntime_genai",)),
)
_GRAPH_FILE = "model.onnx"


def is_graph(artifact: Path) -> bool:
    """Tell whether a folder holds an exported graph."""
    return (artifact / _GRAPH_FILE).is_file()


def graph_runners(artifact: Path, *, name: str) -> list[Runner]:
    """Return everything that runs an exported graph."""
    return [
        GraphRunner(
            name=f"{name}, {title}",
            what=f"{title} on {artifact}",
            module=module,
            packages=packages,
            artifact=artifact,
        )
        for title, module, packages in _GRAPH_RUNNERS
    ]


def artifact_runner(artifact: Path, *, name: str, rounded: torch.dtype | None) -> TorchRunner:
    """Return what runs a folder of safetensors.

    Args:
        artifact: the folder.
        name: of its row.
        rounded: the coarsest dtype that its weights were rounded to; None if none were.
    """
    stored = "weights as in the checkpoint" if rounded is None else f"weights in {rounded}"
    return TorchRunner(
        name=name,
        what=f"our model on {artifact}, {stored.replace('torch.', '')}",
        setting=TorchRun(numerics=SERVED),
        artifact=artifact,
        rounded=rounded,
        continues=True,
    )
