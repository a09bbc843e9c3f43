"""What a calibration will take, told before it starts: arithmetic, then memory, then time.

An estimate: products are counted from the config, and how fast this machine multiplies is measured
with one matrix. The share of that speed which whole runs reach was measured on the example.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kimi_convert.checkpoints.mapping import Entry
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.calibration import CalibrationRecipe, InitMethod
from kimi_convert.conversion.calibration.ahead import layers_ahead
from kimi_convert.conversion.calibration.moves import MOVES
from kimi_convert.conversion.calibration.streams import rows_together, stays_in_memory
from kimi_convert.model.names.layout import expected_entries

# moonlet-7m, 2 cores of an AMD EPYC (Zen 5): 9 TFLOP as counted here took 160 s, at 210 GFLOP/s in
# large products.
_REACHED = 0.27
_OPTIONS_PER_MOVE = 4.2
_SETS = 11  # of kept layers that are compared
PROBED = 6160  # tokens of all probes
_CHUNK = 64
_SEARCH_TENSORS = 22  # of the size of one mixer's features, at once
_SIDE = 1024
_DISTILL_PASSES = 5.0  # through both models, backwards included, in passes forwards
_ALL_PASSES = 6.0  # the same with gradients of all weights, which are as many products again
_KDA_SHARE = 1.5  # parameters of a KDA mixer over those of the MLA that it replaces, roughly
_KEPT_OF_STEP = 64.0  # values that a training step keeps, in those of the stream after each layer
_COPIES = 6  # of what is trained: masters, gradients, two moments, the start, the best so far
_FP32, _HALF = 4, 2
_LOGITS_AT_ONCE = 5  # tensors of the size of the logits


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationCost:
    """An estimate."""

    flops: float
    memory_bytes: int
    disk_bytes: int  # of streams that do not stay in memory

    def seconds(self, device: torch.device | str = "cpu") -> float:
        """Return the estimated time on a device, by a product that is timed now."""
        return self.flops / (_REACHED * _flops_per_second(torch.device(device)))


def calibration_cost(
    config: ModelConfig, recipe: CalibrationRecipe, device: torch.device | str = "cpu"
) -> CalibrationCost:
    """Estimate from the teacher's config alone, for a run on a device."""
    entries = list(expected_entries(config))
    layers, width = config.num_layers, config.hidden_size
    tokens, checked = recipe.tokens, recipe.validation_tokens
    searched = recipe.search_tokens
    # In tokens through one layer: both passes of both models, every layer's two futures, the sets.
    passed = layers * (searched + checked * (3 + layers + _SETS) + 2 * (tokens + PROBED))
    active = sum(_active(entries, config)) / layers
    per_pass, passes = _search_flops(config), len(MOVES) * _OPTIONS_PER_MOVE
    searches = passes if recipe.method is InitMethod.SEARCH else 1.0
    aligned = 3 * recipe.align.steps * recipe.align.tokens_per_step
    flops = 2 * active * passed + layers * (searches * searched + aligned) * per_pass
    trained = recipe.distill.steps * recipe.distill.tokens_per_step
    head = config.vocab_size * width
    runs = _ALL_PASSES if recipe.distill.trains_all else _DISTILL_PASSES
    flops += trained * runs * (2 * (active * layers + head) + layers * per_pass)
    streams = [_FP32 * width * size for size in (tokens, tokens, searched)]
    futures = _FP32 * width * checked * (2 * layers + 1)
    device = torch.device(device)
    resident = [size for size in streams if stays_in_memory(size, device)]
    search = search_bytes(config, searched)
    ahead = layers_ahead(device, search_bytes=search)
    layer = max(_layer_bytes(entries).values())
    kept, at_once = _logits_bytes(config, recipe)
    memory = max(ahead * (layer + search), at_once) + kept + sum(resident) + futures
    if trained:
        memory = max(memory, _distill_bytes(config, recipe, entries, on_gpu=device.type != "cpu"))
    return CalibrationCost(
        flops=flops,
        memory_bytes=int(memory),
        disk_bytes=int(sum(streams) - sum(resident)),
    )


def _logits_bytes(config: ModelConfig, recipe: CalibrationRecipe) -> tuple[float, float]:
    """Return what the teacher's predictions hold in fp16, and what those of some rows do at once."""
    of_a_row = recipe.sequence_length * config.vocab_size
    kept = _HALF * recipe.validation_tokens * config.vocab_size
    return kept, _LOGITS_AT_ONCE * _FP32 * rows_together(of_a_row) * of_a_row


def _distill_bytes(
    config: ModelConfig, recipe: CalibrationRecipe, entries: list[Entry], *, on_gpu: bool
) -> float:
    """Return what the whole model, its training's state and the tokens of one step hold."""
    frozen = sum(_layer_bytes(entries).values()) * (0.5 if on_gpu else 1.0)
    mixers = sum(_FP32 * _size(entry) for entry in entries if ".mla." in entry.template)
    ends = 2 * _FP32 * config.vocab_size * config.hidden_size
    trained = _KDA_SHARE * mixers
    if recipe.distill.trains_all:
        trained += sum(_layer_bytes(entries).values()) - mixers + ends
    state = _COPIES * trained
    step = recipe.distill.tokens_per_step * config.hidden_size * config.num_layers
    return frozen + ends + state + _FP32 * _KEPT_OF_STEP * step


def search_bytes(config: ModelConfig, tokens: int) -> int:
    """Return what the search of one layer holds, for so many tokens."""
    return _SEARCH_TENSORS * _FP32 * config.mla.num_heads * config.mla.v_head_dim * tokens


def _search_flops(config: ModelConfig) -> float:
    """Return the products of one token in one pass of a search."""
    heads, key, value = (
        config.mla.num_heads,
        config.mla.qk_nope_head_dim,
        config.mla.v_head_dim,
    )
    features = heads * value
    projections = 2.4 * config.hidden_size * features
    recurrence = 2 * heads * (_CHUNK * (4 * key + 2 * value) + 3 * key * value)
    sums = 2 * features * (features + min(config.hidden_size, 256) + value)
    return projections + recurrence + sums


def _active(entries: list[Entry], config: ModelConfig) -> Iterator[float]:
    """Yield the parameters that a token meets, layer by layer."""
    moe = config.moe
    share = moe.num_experts_per_token / moe.num_experts if moe else 1.0
    for entry in entries:
        if entry.layer_idx is not None:
            routed = ".experts." in entry.template
            yield _size(entry) * (share if routed else 1.0)


def _layer_bytes(entries: list[Entry]) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for entry in entries:
        if entry.layer_idx is not None:
            sizes[entry.layer_idx] = sizes.get(entry.layer_idx, 0) + _FP32 * _size(entry)
    return sizes


def _size(entry: Entry) -> int:
    size = 1
    for extent in entry.shape:
        size *= extent
    return size


def _flops_per_second(device: torch.device) -> float:
    matrix = torch.ones(_SIDE, _SIDE, device=device)
    (matrix @ matrix).sum().item()
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * _SIDE**3 / best
