"""The source model as a whole: caches, batches, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kimi_convert.errors import ConfigError
from kimi_convert.model.cache import new_cache
from kimi_convert.model.loading import load_model
from kimi_convert.model.mla_transformer import MlaTransformer
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.model.build import relative_error

YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "v3": tiny_config("deepseek_v3"),
    "v3-half-split-q_lora": tiny_config("deepseek_v3", rope_interleave=False, q_lora_rank=20),
    "v2-yarn": tiny_config("deepseek_v2", rope_scaling=YARN),
    "k2": tiny_config("kimi_k2", n_group=2),
}
# fp32 rounds at 6e-8; cached and whole runs differ in the order of sums of some hundred terms.
FP32_BOUND = 1e-5


@pytest.fixture(params=CONFIGS, ids=str)
def model(request, tmp_path):
    return load_model(write_tiny_checkpoint(tmp_path, CONFIGS[request.param], seed=4))


def tokens_of(length: int) -> torch.Tensor:
    return torch.randint(96, (2, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
@pytest.mark.parametrize(
    "pieces", [[1] * 70, [64, 1, 5], [69, 1]], ids=["tokens", "mixed", "69-1"]
)
def test_cached_pieces_agree_with_one_run(pieces, model):
    tokens = tokens_of(70)
    cache = new_cache(model.config, 2, dtype=torch.float32)
    logits = torch.cat([model(piece, cache) for piece in tokens.split(pieces, 1)], 1)
    assert relative_error(logits, model(tokens)) <= FP32_BOUND
    assert cache.position == 70


@torch.inference_mode()
def test_sequences_of_a_batch_do_not_meet(model):
    tokens = tokens_of(33)
    alone = torch.cat([model(one[None]) for one in tokens])
    assert relative_error(model(tokens), alone) <= FP32_BOUND


@pytest.mark.parametrize("kind", ["deepseek_v3", "kimi_linear"])
def test_a_config_that_does_not_rotate_is_refused(kind):
    config = tiny_config(kind)
    config = replace(config, mla=replace(config.mla, rope=None))
    with pytest.raises(ConfigError, match="rotated"):
        MlaTransformer(config, dtype=torch.float32)
