"""What an artifact is, and how far its weights may be from the checkpoint's."""

from __future__ import annotations

from pathlib import Path

import torch

from kimi_convert.checkpoints.dtypes import torch_dtype
from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.mapping import Storage
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import read_config
from kimi_convert.errors import CheckpointError
from kimi_convert.model.names.layout import MatchedCheckpoint, match_checkpoint
from kimi_convert.validation.bounds import coarsest
from kimi_convert.validation.sample import check_comparable


def rounded_dtype(checkpoint: Path, config: ModelConfig, artifact: Path) -> torch.dtype | None:
    """Return the coarsest dtype that an artifact's weights were rounded to; None if none were.

    What the format keeps in fp32 counts as not rounded: an artifact that narrows it is wrong.

    Raises:
        ConfigError: its config.json is missing or not valid.
        CheckpointError: it is not a readable checkpoint of the same model, or is quantised where
            the checkpoint is not.
    """
    other = read_config(artifact)
    check_comparable(other, config, where=artifact)
    before, after = _match(config, checkpoint), _match(other, artifact)
    found: set[torch.dtype] = set()
    for entry in after.entries:
        if entry.storage is Storage.FP32 or entry.param not in before.weights:
            continue
        source, target = before.weights[entry.param], after.weights[entry.param]
        if target.quantization is not None and source.quantization is None:
            raise CheckpointError(
                "there is no bound to judge weights by that were quantised",
                where=artifact,
                expected="BF16, F16 or F32",
                found=target.stored[0].dtype,
                hint="Quantised checkpoints can be compared with what was written from them.",
            )
        wide, narrow = torch_dtype(source.dtype), torch_dtype(target.dtype)
        if torch.promote_types(wide, narrow) is not narrow:
            found.add(narrow)
    return coarsest(found) if found else None


def _match(config: ModelConfig, folder: Path) -> MatchedCheckpoint:
    return match_checkpoint(config, open_index(folder).tensors.values(), where=folder)
