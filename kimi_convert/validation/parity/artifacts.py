"""What an artifact is, and how far its weights may be from the checkpoint's."""

from __future__ import annotations

from pathlib import Path

import torch

from kimi_convert.checkpoints.dtypes import torch_dtype
from kimi_convert.checkpoints.index import CheckpointIndex, open_index
from kimi_convert.checkpoints.mapping import Match, Storage
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import read_config
from kimi_convert.errors import CheckpointError
from kimi_convert.model.names.layout import WEIGHT_DTYPES, match_checkpoint
from kimi_convert.validation.bounds import coarsest
from kimi_convert.validation.sample import check_comparable


def rounded_dtype(checkpoint: Path, config: ModelConfig, artifact: Path) -> torch.dtype | None:
    """Return the coarsest dtype that an artifact's weights were rounded to; None if none were.

    What the format keeps in fp32 counts as not rounded: an artifact that narrows it is wrong.

    Raises:
        ConfigError: its config.json is missing or not valid.
        CheckpointError: it is not a readable checkpoint of the same model.
    """
    other = read_config(artifact)
    check_comparable(other, config, where=artifact)
    index, written = open_index(checkpoint), open_index(artifact)
    before, after = _match(config, index, checkpoint), _match(other, written, artifact)
    found: set[torch.dtype] = set()
    for entry in after.entries:
        if entry.storage is Storage.FP32 or entry.param not in before.stored_names:
            continue
        source = index.spec(before.stored_names[entry.param]).dtype
        target = written.spec(after.stored_names[entry.param]).dtype
        if not {source, target} <= set(WEIGHT_DTYPES):
            raise CheckpointError(
                "quantised artifacts have no bound to be judged by",
                where=artifact,
                expected=" or ".join(WEIGHT_DTYPES),
                found=target,
                hint="Compare a copy in bfloat16 or float32.",
            )
        wide, narrow = torch_dtype(source), torch_dtype(target)
        if torch.promote_types(wide, narrow) is not narrow:
            found.add(narrow)
    return coarsest(found) if found else None


def _match(config: ModelConfig, index: CheckpointIndex, folder: Path) -> Match:
    return match_checkpoint(config, index.tensors.values(), where=folder)
