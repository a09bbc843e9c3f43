"""What a conversion will read, make and write, to the byte, before a byte is read.

Target-driven: every tensor that the hybrid must hold is enumerated from its config, and each is
made by exactly one rule. A plan is data; `engine` carries it out. No torch, no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kimi_convert.checkpoints.clone import Shareable
from kimi_convert.checkpoints.index import CheckpointIndex, collector_paused, open_index
from kimi_convert.checkpoints.mapping import Dropped
from kimi_convert.checkpoints.shard_plan import PlannedShard, ShardPlan, plan_shards
from kimi_convert.checkpoints.shared_layout import share_layout, shareable
from kimi_convert.checkpoints.weights import Weight
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.output_format import AS_SOURCE, OutputFormat
from kimi_convert.config.recipe import Recipe, default_recipe
from kimi_convert.conversion.rules import Op
from kimi_convert.conversion.runtimes import RuntimeSupport, runtime_support
from kimi_convert.conversion.target import target_config
from kimi_convert.conversion.task_memory import task_bytes
from kimi_convert.conversion.tasks import TensorTask, as_stored, copies, tensor_tasks
from kimi_convert.errors import MappingError
from kimi_convert.model.names.layout import (
    MatchedCheckpoint,
    match_checkpoint,
)

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9


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

    def shareable(self, shards: Iterable[PlannedShard] | None = None) -> Shareable:
        """Return what of these files, or of all, can have the source's blocks instead of room."""
        carried = copies(self.tasks, self.weights)
        wanted = self.shards.shards if shards is None else shards
        return shareable(wanted, carried, self.index.shards)

    @property
    def peak_memory_bytes(self) -> int:
        """Bytes of tensors in memory at once, at most: the largest tensor that is made."""
        return self.working_bytes(self.tasks)

    def working_bytes(self, tasks: Iterable[TensorTask]) -> int:
        """Return the bytes of tensors in memory at once while these are made, at most."""
        return max((task_bytes(task, self.weights) for task in tasks), default=0)

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
            "shareable_bytes": self.shareable().nbytes,
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
    made = tensor_tasks(source_config, target, matched, recipe)
    weights = {
        weight.name: weight for weight in (*matched.weights.values(), *matched.unread.values())
    }
    tasks = tuple(as_stored(made, weights, output_format.dtype))
    _check_all_read(matched, tasks)
    used = {name for task in tasks for name in task.sources}
    kept = {stored for name in used for stored in weights[name].stored_names}
    shards = plan_shards((task.tensor for task in tasks), max_shard_bytes)
    return ConversionPlan(
        index=index,
        source_config=source_config,
        target_config=target,
        recipe=recipe,
        tasks=tasks,
        shards=share_layout(shards, copies(tasks, weights), max_shard_bytes),
        weights={
            weight.name: weight
            for weight in sorted(weights.values(), key=_by_place)
            if weight.name in used
        },
        dropped=tuple(one for one in matched.dropped if one.name not in kept),
        runtimes=runtime_support(target),
    )


def _by_place(weight: Weight) -> tuple[str, int]:
    return weight.stored[0].shard, weight.stored[0].start


def _check_all_read(matched: MatchedCheckpoint, tasks: tuple[TensorTask, ...]) -> None:
    """Check that the rules leave out no part of the model: what is dropped has a reason."""
    used = {name for task in tasks for name in task.sources}
    unread = sorted({weight.name for weight in matched.weights.values()} - used)
    if unread:
        raise MappingError(f"no rule reads {len(unread)} tensors, the first {unread[0]!r}")
