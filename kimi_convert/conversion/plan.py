"""What a conversion will read, make and write, to the byte, before a byte is read.

Target-driven: every tensor that the hybrid must hold is enumerated from its config, and each is
made by exactly one rule. A plan is data; `engine` carries it out. No torch, no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_convert.checkpoints.dtypes import DTYPES
from kimi_convert.checkpoints.index import CheckpointIndex, collector_paused, open_index
from kimi_convert.checkpoints.mapping import Dropped, Entry, Storage
from kimi_convert.checkpoints.shard_plan import PlannedTensor, ShardPlan, plan_shards
from kimi_convert.checkpoints.weight_reader import decoding_bytes, quantizing_bytes
from kimi_convert.checkpoints.weights import Weight
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.output_format import AS_SOURCE, OutputFormat, TargetDtype
from kimi_convert.config.quantization import FP8_SCALE_SUFFIX, FP8_TILE, Encoding, Quantization
from kimi_convert.config.recipe import Recipe, default_recipe
from kimi_convert.config.target_format import TargetFormat
from kimi_convert.conversion.rules import LING_RULES, RULES, Op, Rule, is_solved, is_trained
from kimi_convert.conversion.runtimes import RuntimeSupport, runtime_support
from kimi_convert.conversion.target import target_config
from kimi_convert.errors import MappingError
from kimi_convert.model.names.layout import (
    MatchedCheckpoint,
    expected_entries,
    layout_of,
    match_checkpoint,
    mtp_tensors,
)

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTask:
    """One target tensor: what it is made from, and how."""

    tensor: PlannedTensor
    param: str
    op: Op
    sources: tuple[str, ...]  # names of weights of the source
    layer_idx: int | None
    part: int = 0  # of a tensor stored in several: 0 the values, 1 their scales


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """A whole conversion, not yet begun."""

    index: CheckpointIndex
    source_config: ModelConfig
    target_config: ModelConfig
    recipe: Recipe
    tasks: tuple[TensorTask, ...]
    shards: ShardPlan
    weights: Mapping[str, Weight]  # of the source, by name
    dropped: tuple[Dropped, ...]
    runtimes: tuple[RuntimeSupport, ...]

    @property
    def source(self) -> Path:
        """Folder of the source."""
        return self.index.folder

    def named(self, source: Path) -> ConversionPlan:
        """Return the plan with another name for its source, where its folder is temporary."""
        return replace(self, index=replace(self.index, folder=source))

    @property
    def read_bytes(self) -> int:
        """Bytes of every source tensor that is read, each counted once."""
        return sum(weight.stored_bytes for weight in self.read_weights())

    def read_weights(self) -> tuple[Weight, ...]:
        """Return every weight of the source that is read, each once, in the order of the files."""
        names = {name for task in self.tasks for name in task.sources}
        return tuple(weight for name, weight in self.weights.items() if name in names)

    def stored_sources(self, task: TensorTask) -> list[str]:
        """Return the names in the source's files of what a tensor is made from."""
        if task.op is Op.COPY:
            return [self.weights[task.sources[0]].stored[task.part].name]
        return [stored for name in task.sources for stored in self.weights[name].stored_names]

    @property
    def write_bytes(self) -> int:
        """Bytes of all files of weights."""
        return self.shards.file_bytes

    @property
    def copied_bytes(self) -> int:
        """Bytes of the tensors that are carried over unchanged."""
        return sum(task.tensor.nbytes for task in self.tasks if task.op is Op.COPY)

    @property
    def peak_memory_bytes(self) -> int:
        """Bytes of tensors in memory at once, at most: the largest tensor that is made."""
        return self.working_bytes(self.tasks)

    def working_bytes(self, tasks: Iterable[TensorTask]) -> int:
        """Return the bytes of tensors in memory at once while these are made, at most."""
        return max((_task_bytes(task, self.weights) for task in tasks), default=0)

    def to_json(self) -> dict[str, object]:
        """Return the document that `plan --json` prints."""
        target = self.target_config
        return {
            "source": str(self.source),
            "model_type": self.source_config.model_type,
            "num_layers": target.num_layers,
            "kda_layers": list(target.kda_layers),
            "mla_layers": list(target.mla_layers),
            "recipe": self.recipe.to_json(),
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "copied_bytes": self.copied_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "runtimes": [support.to_json() for support in self.runtimes],
            "files": [
                {"name": shard.file_name, "size": shard.file_bytes} for shard in self.shards.shards
            ],
            "dropped": [{"name": one.name, "why": one.why} for one in self.dropped],
            "tensors": [self._task_json(task) for task in self.tasks],
        }

    def _task_json(self, task: TensorTask) -> dict[str, object]:
        return {
            "name": task.tensor.name,
            "dtype": task.tensor.dtype,
            "shape": list(task.tensor.shape),
            "op": str(task.op),
            "sources": self.stored_sources(task),
        }


def plan_conversion(
    source: str | Path,
    recipe: Recipe | None = None,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    output_format: OutputFormat = AS_SOURCE,
) -> ConversionPlan:
    """Plan the conversion of a checkpoint folder; only its config and headers are read.

    Args:
        source: config.json and safetensors of a full-attention MLA model.
        recipe: None for the default, which is fitted to text.
        max_shard_bytes: of each file of weights, its header included.
        output_format: how the result is stored, where not as the source.

    Raises:
        ConfigError: the config is not valid or not of a model that can become a hybrid.
        CheckpointError: tensors are missing, unknown, mis-shaped or of a wrong dtype.
        MappingError: the rules do not fit the model, which is a fault of kimi-convert.
        RecipeError: the recipe does not fit the model.
    """
    with collector_paused():
        return _plan(Path(source), recipe or default_recipe(), max_shard_bytes, output_format)


def _plan(
    source: Path, recipe: Recipe, max_shard_bytes: int, output_format: OutputFormat
) -> ConversionPlan:
    source_config = read_config(source)
    # Layers that a calibration will choose are planned where the released pattern has them.
    target = target_config(source_config, replace(recipe, choose_layers=False), output_format)
    index = open_index(source)
    matched = match_checkpoint(source_config, index.tensors.values(), where=source)
    made = (
        *_tasks(source_config, target, matched, recipe),
        *_mtp_tasks(source_config, target, matched),
    )
    weights = {
        weight.name: weight for weight in (*matched.weights.values(), *matched.unread.values())
    }
    tasks = tuple(as_stored(made, weights, output_format.dtype))
    _check_all_read(matched, tasks)
    used = {name for task in tasks for name in task.sources}
    kept = {stored for name in used for stored in weights[name].stored_names}
    return ConversionPlan(
        index=index,
        source_config=source_config,
        target_config=target,
        recipe=recipe,
        tasks=tasks,
        shards=plan_shards((task.tensor for task in tasks), max_shard_bytes),
        weights={
            weight.name: weight
            for weight in sorted(weights.values(), key=_by_place)
            if weight.name in used
        },
        dropped=tuple(one for one in matched.dropped if one.name not in kept),
        runtimes=runtime_support(target),
    )


def _tasks(
    source: ModelConfig,
    target: ModelConfig,
    matched: MatchedCheckpoint,
    recipe: Recipe,
) -> Iterator[TensorTask]:
    rules = _RuleBook(source, _rules_of(recipe.output_format))
    weights = dict(matched.weights)
    if source.tie_word_embeddings:
        weights["head.weight"] = weights["embed.weight"]
    for entry in expected_entries(target):
        rule = rules.rule_for(entry)
        sources = tuple(weights[param] for param in rules.sources_of(rule, entry))
        yield TensorTask(
            tensor=PlannedTensor(entry.name, _dtype(entry, rule, sources, matched), entry.shape),
            param=entry.param,
            op=Op.FITTED if _is_fitted(rule, recipe) else rule.op,
            sources=tuple(weight.name for weight in sources),
            layer_idx=entry.layer_idx,
        )


def _mtp_tasks(
    source: ModelConfig, target: ModelConfig, matched: MatchedCheckpoint
) -> Iterator[TensorTask]:
    """Give what is carried over of MTP layers, where the target keeps them."""
    if not target.num_mtp_layers:
        return
    tensors = mtp_tensors(source, target)
    for weight in matched.unread.values():
        if weight.name in tensors:
            param, name = tensors[weight.name]
            tensor = PlannedTensor(name, weight.dtype, weight.shape)
            yield TensorTask(
                tensor=tensor, param=param, op=Op.COPY, sources=(weight.name,), layer_idx=None
            )


def as_stored(
    tasks: Iterable[TensorTask], weights: Mapping[str, Weight], dtype: TargetDtype
) -> Iterator[TensorTask]:
    """Say of every tensor that is carried over how it gets from its format to the target's."""
    for task in tasks:
        weight = weights[task.sources[0]] if task.op is Op.COPY else None
        if weight is None:
            yield task
        elif dtype is TargetDtype.FP8 and _is_feed_forward_matrix(task):
            yield from _fp8_tasks(task, weight)
        else:
            plain = weight.quantization is None
            yield task if plain else replace(task, op=Op.DEQUANTIZE)


def _is_feed_forward_matrix(task: TensorTask) -> bool:
    """Tell what is worth quantising: nearly all of a large model, and no router and no norm."""
    return task.param.rpartition(".")[0].endswith((".gate", ".up", ".down"))


def _fp8_tasks(task: TensorTask, weight: Weight) -> Iterator[TensorTask]:
    """Give the values and their scales: as they are stored, or made."""
    tile = FP8_TILE
    same = Quantization(Encoding.FP8_BLOCK, tile, tile)
    copied = weight.quantization == same and weight.stored[1].dtype == "F32"
    op = Op.COPY if copied else Op.QUANTIZE
    rows, columns = task.tensor.shape
    scales = (-(-rows // tile), -(-columns // tile))
    name = task.tensor.name
    yield replace(task, tensor=PlannedTensor(name, "F8_E4M3", (rows, columns)), op=op)
    tensor = PlannedTensor(name + FP8_SCALE_SUFFIX, "F32", scales)
    yield replace(task, tensor=tensor, op=op, part=1)


def _rules_of(form: TargetFormat) -> tuple[Rule, ...]:
    tables = {TargetFormat.KIMI_LINEAR: RULES, TargetFormat.BAILING_HYBRID: LING_RULES}
    return tables[form]


def _is_fitted(rule: Rule, recipe: Recipe) -> bool:
    """Tell whether a parameter comes from the calibration."""
    fitted = recipe.calibration
    if fitted is None:
        return False
    return is_trained(rule) if fitted.trains else is_solved(rule)


class _RuleBook:
    """Finds the one rule of a target tensor, and fills in its layer and expert."""

    def __init__(self, source: ModelConfig, rules: tuple[Rule, ...]) -> None:
        self._layers: Mapping[str, frozenset[int]] = {
            name: frozenset(layers) for name, layers in layout_of(source).layers.items()
        }
        self._by_target: dict[str, list[Rule]] = {}
        for rule in rules:
            self._by_target.setdefault(rule.target, []).append(rule)

    def rule_for(self, entry: Entry) -> Rule:
        """Return the rule whose layer set holds the tensor's layer."""
        found = [
            rule
            for rule in self._by_target.get(entry.template, ())
            if entry.layer_idx is None or entry.layer_idx in self._layers[rule.where]
        ]
        if len(found) != 1:
            raise MappingError(f"{len(found)} rules make the parameter {entry.param!r}, not one")
        return found[0]

    def sources_of(self, rule: Rule, entry: Entry) -> tuple[str, ...]:
        """Return the rule's sources for the layer and expert of the tensor."""
        return tuple(entry.fill(source) for source in rule.sources)


def _by_place(weight: Weight) -> tuple[str, int]:
    return weight.stored[0].shard, weight.stored[0].start


def _dtype(
    entry: Entry, rule: Rule, sources: tuple[Weight, ...], matched: MatchedCheckpoint
) -> str:
    """Return the stored dtype: the source's for what is made from one, else the layer's."""
    if entry.storage is Storage.FP32:
        return "F32"
    if sources:
        # The last source is the matrix that the target replaces, except for `o`, which is first.
        return sources[0 if rule.op in (Op.COPY, Op.SCALE_OUTPUT) else -1].dtype
    return matched.weights[f"layers.{entry.layer_idx}.mla.o.weight"].dtype


def _check_all_read(matched: MatchedCheckpoint, tasks: tuple[TensorTask, ...]) -> None:
    """Check that the rules leave out no part of the model: what is dropped has a reason."""
    used = {name for task in tasks for name in task.sources}
    unread = sorted({weight.name for weight in matched.weights.values()} - used)
    if unread:
        raise MappingError(f"no rule reads {len(unread)} tensors, the first {unread[0]!r}")


def _task_bytes(task: TensorTask, weights: Mapping[str, Weight]) -> int:
    """Return the bytes of one task's tensors, at the worst of its moments.

    Sources are read and widened one after the other; then a transform makes its result; then the
    sources are let go, and the result is narrowed.
    """
    sources = [weights[name] for name in task.sources]
    if task.op in (Op.COPY, Op.DEQUANTIZE):
        return decoding_bytes(sources[0])
    if task.op is Op.QUANTIZE:
        return quantizing_bytes(sources[0])
    made = math.prod(task.tensor.shape)
    narrowing = made * (_FP32_BYTES + DTYPES[task.tensor.dtype].width_bytes)
    if task.op is Op.FITTED:
        return narrowing
    sizes = [math.prod(weight.shape) for weight in sources]
    wide = sum(sizes) * _FP32_BYTES
    reading = max(map(decoding_bytes, sources), default=0)
    # The power of a folded matrix holds its rows, scaled, and two products of their size; a fold
    # its rows and those scaled; an output is not folded, and is scaled where it is. Random numbers
    # are drawn, then scaled.
    if task.op is Op.SCALE_OUTPUT:
        making = 4 * max(sizes[1:])
    elif task.op in (Op.FOLD_QUERY, Op.FOLD_KEY, Op.FOLD_VALUE):
        making = 2 * max(sizes) + made
    else:
        making = 4 * max(sizes, default=made // 4) + made
    return max(wide + max(reading, making * _FP32_BYTES), narrowing)
