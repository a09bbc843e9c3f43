"""How the tensors of released models lie in their files, as far as it is known.

Moonlight and Kimi-K2 have a file for each layer, DeepSeek-V3 has 163 files of 4.3 GB. Within a file
they lie as the safetensors library writes them: the widest dtype first, then by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from kimi_convert.bench.released_shapes import shaped_tensors
from kimi_convert.checkpoints.dtypes import DTYPES
from kimi_convert.checkpoints.shard_plan import PlannedTensor, ShardPlan, plan_shards
from kimi_convert.config.huggingface import parse_config

_DEEPSEEK_BYTES = 4_300_000_000
_WHOLE = 10**18


def released_files(model: str, document: Mapping[str, object]) -> ShardPlan:
    """Return the files of a released model, or of one with another config.json laid out as it."""
    tensors = tuple(shaped_tensors(parse_config(document)))
    if model == "deepseek-v3":
        files = [shard.tensors for shard in plan_shards(tensors, _DEEPSEEK_BYTES).shards]
    else:
        files = list(_by_layer(tensors))
    shards = (plan_shards(sorted(file, key=_as_written), _WHOLE).shards[0] for file in files)
    return ShardPlan(
        tuple(
            replace(shard, file_name=f"model-{number:05d}-of-{len(files):05d}.safetensors")
            for number, shard in enumerate(shards, start=1)
        )
    )


def _by_layer(tensors: Iterable[PlannedTensor]) -> Iterable[list[PlannedTensor]]:
    """Give the tensors of each layer; what comes before or after the layers has its own file."""
    files: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        fields = tensor.name.split(".")
        files.setdefault(fields[2] if fields[1] == "layers" else fields[0], []).append(tensor)
    return files.values()


def _as_written(tensor: PlannedTensor) -> tuple[int, str]:
    return -DTYPES[tensor.dtype].width_bytes, tensor.name
