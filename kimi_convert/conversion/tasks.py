"""What becomes of each tensor of a hybrid: what it is made from, and how.

Every tensor of the target is enumerated, and each is made by exactly one rule; then it is said of
what is carried over how it gets from its format to the target's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from kimi_convert.checkpoints.mapping import Entry, Storage
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.checkpoints.shard_plan import PlannedTensor
from kimi_convert.checkpoints.weights import Weight
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.output_format import TargetDtype
from kimi_convert.config.quantization import FP8_SCALE_SUFFIX, FP8_TILE, Encoding, Quantization
from kimi_convert.config.recipe import Recipe
from kimi_convert.config.target_format import TargetFormat
from kimi_convert.conversion.rules import LING_RULES, RULES, Op, Rule, is_solved, is_trained
from kimi_convert.errors import MappingError
from kimi_convert.model.names.layout import (
    MatchedCheckpoint,
    expected_entries,
    layout_of,
    mtp_tensors,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTask:
    """One target tensor: what it is made from, and how."""

    tensor: PlannedTensor
    param: str
    op: Op
    sources: tuple[str, ...]  # names of weights of the source
    layer_idx: int | None
    part: int = 0  # of a tensor stored in several: 0 the values, 1 their scales


def tensor_tasks(
    source: ModelConfig,
    target: ModelConfig,
    matched: MatchedCheckpoint,
    recipe: Recipe,
) -> Iterator[TensorTask]:
    """Give a task for every tensor of the target, as if nothing were quantised.

    Raises:
        MappingError: a tensor has no rule, or several.
    """
    yield from _tasks(source, target, matched, recipe)
    yield from _mtp_tasks(source, target, matched)


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


def copies(tasks: Iterable[TensorTask], weights: Mapping[str, Weight]) -> dict[str, TensorSpec]:
    """Return, by their new names, where the tensors lie whose bytes are carried over unchanged."""
    return {
        task.tensor.name: weights[task.sources[0]].stored[task.part]
        for task in tasks
        if task.op is Op.COPY
    }


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
    if not fitted.trains:
        return is_solved(rule)
    return is_trained(rule.target, everything=fitted.distill.trains_all)


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
