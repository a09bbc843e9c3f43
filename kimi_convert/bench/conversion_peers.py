"""Other programs that read and write a whole checkpoint, run on the same bytes.

mergekit in an environment of its own, with `passthrough` of one model; transformers in this one,
`from_pretrained` and `save_pretrained`. Neither converts anything: they bound what moving costs. What
each has written is counted, since a program may leave tensors out without a word.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kimi_convert.bench.process_cost import Cost, run_measured
from kimi_convert.config.huggingface import read_config

_TRANSFORMERS = """
import sys, torch
from transformers import DeepseekV3ForCausalLM
model = DeepseekV3ForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


def measure_written(command: Sequence[object], output: Path) -> tuple[Cost, int]:
    """Run a program; return its cost and how many bytes it wrote, which are removed."""
    try:
        cost = run_measured(command)
        return cost, sum(path.stat().st_size for path in output.iterdir())
    finally:
        shutil.rmtree(output, ignore_errors=True)


def measure_peers(
    source: Path, output: Path, mergekit: Path | None
) -> dict[str, tuple[Cost, int]]:
    """Run each program that there is."""
    commands: dict[str, tuple[object, ...]] = {
        "transformers save_pretrained": (sys.executable, "-c", _TRANSFORMERS, source, output)
    }
    if mergekit is not None:
        commands["mergekit passthrough"] = _mergekit(source, output, mergekit)
    return {name: measure_written(command, output) for name, command in commands.items()}


def _mergekit(source: Path, output: Path, mergekit: Path) -> tuple[object, ...]:
    layers = read_config(source).num_layers
    recipe = source.parent / "passthrough.yaml"
    recipe.write_text(
        "merge_method: passthrough\n"
        "dtype: bfloat16\n"
        "slices:\n"
        f"  - sources: [{{model: {source}, layer_range: [0, {layers}]}}]\n",
        encoding="utf-8",
    )
    return (mergekit, recipe, output, "--no-copy-tokenizer", "--quiet")
