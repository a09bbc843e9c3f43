"""What calibrating a large model takes, from a few of its layers: `python -m kimi_convert.bench.calibration_cost`.

    [--model moonlight] [--layers N] [--device cuda] [--folder DIR] [--json FILE]

A checkpoint with the model's shapes, its vocabulary and a few layers of random weights is calibrated
by the default recipe. What a layer takes is read off the progress; the whole model takes

    sum over layers l of (search + first + each more * l)     first pass: what is tried out grows with l
    + layers * sets * (one layer of one set)                  choice of layers
    + layers * (one layer)                                    second pass

Random weights attend evenly: what the search chooses means nothing, what it computes is the same.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from kimi_convert.bench.released_shapes import MODELS
from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import parse_config
from kimi_convert.config.progress import ProgressEvent
from kimi_convert.config.recipe import default_recipe
from kimi_convert.conversion.calibration.run import calibrate
from kimi_convert.model.names.layout import expected_entries

_SETS = 11  # that are compared where at least three layers stay
_STUDY, _CHOICE, _SOLVE = "fitting mixers", "choosing layers", "solving outputs"
_LEAST_LAYERS = 4  # the first differs, and a slope takes two more
_KNOWN_IDS = (16, 4096)  # of the example's tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """What one layer takes, by stage."""

    search: float  # statistics, search and ridge
    tried_first: float  # both futures of the first layer, and loading it
    tried_more: float  # the same for each layer before
    chosen: float  # in the choice, for each set
    solved: float  # in the second pass

    def total(self, num_layers: int) -> float:
        """Return the seconds of a whole model."""
        tried = sum(self.tried_first + self.tried_more * n for n in range(num_layers))
        every = self.search + _SETS * self.chosen + self.solved
        return num_layers * every + tried


class Trace:
    """When which progress was told."""

    def __init__(self) -> None:
        """Start the clock."""
        self.events: list[tuple[float, ProgressEvent]] = []

    def __call__(self, event: ProgressEvent) -> None:
        """Note an event."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.events.append((time.monotonic(), event))

    def times(self, stage: str) -> list[tuple[float, int]]:
        """Return (time, done) of a stage's events."""
        return [(when, event.done) for when, event in self.events if event.stage == stage]


def layer_seconds(trace: Trace, *, num_layers: int, num_sets: int) -> LayerSeconds:
    """Read what a layer takes off the progress of a calibration of at least four layers."""
    study = trace.times(_STUDY)
    # "%" of a layer: a search begins with the last event of 100 n, and ends with the first of the next.
    begins = [max(t for t, done in study if done == 100 * n) for n in range(num_layers)]
    ends = [min(t for t, done in study if done >= 100 * (n + 1)) for n in range(num_layers)]
    searches = [end - begin for begin, end in zip(begins, ends, strict=True)][1:]
    between = [begin - end for begin, end in zip(begins[1:], ends[:-1], strict=True)]
    more = (between[-1] - between[1]) / (len(between) - 2)
    choice, solve = trace.times(_CHOICE), trace.times(_SOLVE)
    return LayerSeconds(
        search=sum(searches) / len(searches),
        tried_first=max(0.0, between[-1] - more * (len(between) - 1)),
        tried_more=more,
        chosen=(choice[-1][0] - choice[1][0]) / (num_layers - 1) / num_sets,
        solved=(solve[-1][0] - solve[1][0]) / (num_layers - 1),
    )


def write_random(folder: Path, config: ModelConfig, document: dict[str, object]) -> None:
    """Write a checkpoint of random bf16 weights, a file for each layer, with the example's tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((example_checkpoint() / name).read_bytes())
    weight_map: dict[str, str] = {}
    files: dict[str, dict[str, torch.Tensor]] = {}
    draws = torch.Generator().manual_seed(0)
    for entry in expected_entries(config):
        file = f"model-{entry.layer_idx}.safetensors"
        weight_map[entry.name] = file
        weights = torch.empty(entry.shape, dtype=torch.bfloat16)
        # One draw for many: a generator gives some 50 million values a second.
        drawn = torch.randn(min(weights.numel(), 1_000_003), generator=draws) * 0.02
        flat = weights.flatten()
        for part in flat.split(len(drawn)):
            part.copy_(drawn[: len(part)])
        files.setdefault(file, {})[entry.name] = flat.view(entry.shape)
    for file, tensors in files.items():
        ones = {n: torch.ones_like(t) if t.ndim == 1 else t for n, t in tensors.items()}
        save_file(ones, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def measure(model: str, num_layers: int, device: str, folder: Path) -> dict[str, object]:
    """Calibrate a few layers of a released model's shapes; return seconds and bytes."""
    whole = parse_config(dict(MODELS[model]))
    document = {**MODELS[model], "num_hidden_layers": num_layers}
    config = parse_config(document)
    write_random(folder / model, config, document)
    recipe = default_recipe()
    assert recipe.calibration is not None
    text = folder / "ids.jsonl"
    order = random.Random(0)  # noqa: S311  (a text, not a secret)
    ids = [order.randrange(*_KNOWN_IDS) for _ in range(recipe.calibration.tokens + 1)]
    text.write_text(json.dumps({"ids": ids}) + "\n", encoding="utf-8")
    trace = Trace()
    found = calibrate(
        folder / model, folder / "work", recipe=recipe, text=text, device=device, on_progress=trace
    )
    per_layer = layer_seconds(trace, num_layers=num_layers, num_sets=len(found.report.compared))
    on_gpu = torch.device(device).type == "cuda"
    return {
        "model": model,
        "measured_layers": num_layers,
        "layer_seconds": asdict(per_layer),
        "estimated_layers": whole.num_layers,
        "estimated_seconds": per_layer.total(whole.num_layers),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m kimi_convert.bench.calibration_cost")
    parser.add_argument("--model", choices=sorted(MODELS), default="moonlight")
    parser.add_argument("--layers", type=int, default=_LEAST_LAYERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if given.layers < _LEAST_LAYERS:
        parser.error(f"--layers must be at least {_LEAST_LAYERS}")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = measure(given.model, given.layers, given.device, Path(folder))
    text = json.dumps(found, indent=2) + "\n"
    sys.stdout.write(text)
    if given.json:
        given.json.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
