"""What a checkpoint folder holds, told from config.json, the index and the headers alone.

No tensor is read and torch is not imported. A folder that would be refused elsewhere is still
summarised as far as its config.json goes; what is wrong with it is listed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kimi_convert.checkpoints.index import CheckpointIndex, open_index
from kimi_convert.checkpoints.mapping import Dropped, Entry
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import CONFIG_FILE, read_config
from kimi_convert.errors import CheckpointError, InputError, KimiConvertError
from kimi_convert.model.names.layout import expected_entries, match_checkpoint

# The part that a parameter belongs to, by the fields of its name after the layer's.
_PARTS: Mapping[tuple[str, ...], str] = {
    ("embed",): "embedding",
    ("head",): "output head",
    ("norm",): "norms",
    ("input_norm",): "norms",
    ("mlp_norm",): "norms",
    ("kda",): "KDA mixers",
    ("mla",): "MLA mixers",
    ("mlp",): "dense feed-forward",
    ("moe", "router"): "routers",
    ("moe", "shared"): "shared experts",
    ("moe", "experts"): "routed experts",
}
_ROUTED_EXPERTS = "routed experts"


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One layer, counted from 0."""

    layer_idx: int
    mixer: str  # "kda" or "mla"
    feed_forward: str  # "dense" or "moe"
    parameters: int


@dataclass(frozen=True, slots=True)
class PartSummary:
    """The parameters of one part, over all layers."""

    part: str
    parameters: int
    active_parameters: int  # that one token uses


@dataclass(frozen=True, slots=True)
class DtypeSummary:
    """The tensors stored in one dtype."""

    dtype: str  # safetensors name
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """One file of weights."""

    name: str
    nbytes: int  # of the file
    tensors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """What a checkpoint folder holds. Layers and parts are config.json's, the rest is stored."""

    folder: Path
    config: ModelConfig
    layers: tuple[LayerSummary, ...]
    parts: tuple[PartSummary, ...]
    dtypes: tuple[DtypeSummary, ...]
    shards: tuple[ShardSummary, ...]
    dropped: tuple[Dropped, ...]  # stored tensors that nothing reads
    problems: tuple[KimiConvertError, ...]  # why other commands refuse this checkpoint

    @property
    def parameters(self) -> int:
        """All parameters that config.json asks for."""
        return sum(part.parameters for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses."""
        return sum(part.active_parameters for part in self.parts)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(shard.nbytes for shard in self.shards)

    def to_json(self) -> dict[str, object]:
        """Return the document that `inspect --json` prints."""
        config = asdict(self.config)
        return {
            "checkpoint": str(self.folder),
            "model_type": self.config.model_type,
            "config": {key: config[key] for key in config if key != "carried"},
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "file_bytes": self.file_bytes,
            "tensors": sum(shard.tensors for shard in self.shards),
            "layers": _rows(self.layers),
            "parts": _rows(self.parts),
            "dtypes": _rows(self.dtypes),
            "shards": _rows(self.shards),
            "dropped": _rows(self.dropped),
            "problems": [problem.to_json()["error"] for problem in self.problems],
        }


def summarize_checkpoint(folder: str | Path) -> CheckpointSummary:
    """Summarise a checkpoint of any supported architecture.

    Raises:
        ConfigError: config.json is missing, not valid or of an unknown architecture.
        CheckpointError: there is no such folder.
    """
    folder = Path(folder)
    problems: list[KimiConvertError] = []
    index = None
    try:
        index = open_index(folder)
    except CheckpointError as error:
        if not (folder / CONFIG_FILE).exists():
            raise  # says more than "config.json is missing"
        problems.append(error)
    config = read_config(folder)
    matched = None
    if index is not None:
        try:
            matched = match_checkpoint(config, index.tensors.values(), where=folder)
        except InputError as error:
            problems.append(error)
    entries = matched.entries if matched else expected_entries(config)
    return CheckpointSummary(
        folder=folder,
        config=config,
        layers=_layers(config, entries),
        parts=_parts(config, entries),
        dtypes=_dtypes(index) if index else (),
        shards=_shards(index) if index else (),
        dropped=matched.dropped if matched else (),
        problems=tuple(problems),
    )


def _layers(config: ModelConfig, entries: Sequence[Entry]) -> tuple[LayerSummary, ...]:
    parameters: Counter[int] = Counter()
    for entry in entries:
        if entry.layer_idx is not None:
            parameters[entry.layer_idx] += math.prod(entry.shape)
    kda_layers, moe_layers = frozenset(config.kda_layers), frozenset(config.moe_layers)
    return tuple(
        LayerSummary(
            layer_idx,
            "kda" if layer_idx in kda_layers else "mla",
            "moe" if layer_idx in moe_layers else "dense",
            parameters[layer_idx],
        )
        for layer_idx in range(config.num_layers)
    )


def _parts(config: ModelConfig, entries: Sequence[Entry]) -> tuple[PartSummary, ...]:
    parameters = dict.fromkeys(_PARTS.values(), 0)
    part_of = {template: _part(template) for template in {entry.template for entry in entries}}
    for entry in entries:
        parameters[part_of[entry.template]] += math.prod(entry.shape)
    return tuple(
        PartSummary(part, count, _active(config, part, count))
        for part, count in parameters.items()
        if count
    )


def _part(template: str) -> str:
    fields = template.removeprefix("layers.{layer}.").split(".")
    return _PARTS.get((fields[0],)) or _PARTS[fields[0], fields[1]]


def _active(config: ModelConfig, part: str, parameters: int) -> int:
    if part != _ROUTED_EXPERTS or config.moe is None:
        return parameters
    return parameters * config.moe.num_experts_per_token // config.moe.num_experts


def _dtypes(index: CheckpointIndex) -> tuple[DtypeSummary, ...]:
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in index.tensors.values():
        tensors[tensor.dtype] += 1
        nbytes[tensor.dtype] += tensor.nbytes
    return tuple(DtypeSummary(dtype, tensors[dtype], size) for dtype, size in nbytes.most_common())


def _shards(index: CheckpointIndex) -> tuple[ShardSummary, ...]:
    tensors = Counter(tensor.shard for tensor in index.tensors.values())
    return tuple(
        ShardSummary(name, shard.nbytes, tensors[name]) for name, shard in index.shards.items()
    )


def _rows(
    rows: Sequence[LayerSummary | PartSummary | DtypeSummary | ShardSummary | Dropped],
) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]
