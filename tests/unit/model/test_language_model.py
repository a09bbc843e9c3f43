"""Embedding, layers and head: what a call adds up to."""

from __future__ import annotations

import copy

import torch

from kimi_convert.model.cache import new_cache
from kimi_convert.model.loading import load_model
from tests.tiny import tiny_config, write_tiny_checkpoint

CONFIG = tiny_config("kimi_linear")
TOKENS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))


def test_parts_are_the_whole(tmp_path):
    model = load_model(write_tiny_checkpoint(tmp_path, CONFIG))
    hidden = model.embed(TOKENS)
    for layer in model.layers:
        hidden = layer(hidden)
    assert torch.equal(model.head(hidden), model(TOKENS))
    assert torch.equal(model.head(hidden), model.norm(hidden) @ model.head.weight.T)


def test_position_counts_the_tokens_seen(tmp_path):
    model = load_model(write_tiny_checkpoint(tmp_path, CONFIG))
    cache = new_cache(CONFIG, 2, dtype=torch.float32)
    for length, position in ((3, 3), (1, 4), (16, 20)):
        model(TOKENS[:, :length], cache)
        assert cache.position == position


def test_a_copied_model_has_its_own_final_norm(tmp_path):
    model = load_model(write_tiny_checkpoint(tmp_path, CONFIG))
    other = copy.deepcopy(model)
    other.norm.weight.zero_()
    assert not other(TOKENS).any()
    assert model(TOKENS).any()


def test_head_follows_the_model_to_another_dtype(tmp_path):
    model = load_model(write_tiny_checkpoint(tmp_path, CONFIG)).double()
    assert model(TOKENS).dtype is torch.float64
