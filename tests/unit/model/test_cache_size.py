"""Bytes that a model keeps of a sequence: as the caches of the reference models have them."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.outlook import Outlook, conversion_outlook
from kimi_convert.conversion.plan import plan_conversion
from kimi_convert.errors import ConfigError
from kimi_convert.model.cache import new_cache
from kimi_convert.model.cache_size import cache_size
from kimi_convert.model.loading import load_model
from tests.golden.test_released_models import config_of
from tests.tiny import tiny_config, write_tiny_checkpoint


@pytest.mark.parametrize("kind", ["kimi_linear", "deepseek_v3"])
@pytest.mark.parametrize("tokens", [64, 128])  # the models' caches grow by 64
def test_size_is_that_of_the_models_own_cache(kind, tokens, tmp_path):
    config = tiny_config(kind, dtype="bfloat16")
    model = load_model(write_tiny_checkpoint(tmp_path, config), dtype=torch.bfloat16)
    cache = new_cache(config, 1, dtype=torch.bfloat16)
    model(torch.arange(tokens)[None] % 96, cache=cache)
    assert cache.nbytes == cache_size(config).at(tokens)


def test_kimi_linear_keeps_what_its_report_says():
    size = cache_size(config_of("kimi-linear-48b-a3b"))
    assert size.bytes_per_token == 7 * 576 * 2
    assert size.bytes_per_sequence == 20 * (2 * 2**20 + 3 * 4096 * 3 * 2)


def test_conversion_cuts_the_cache_of_long_contexts_by_three_quarters():
    source = config_of("kimi-k2-instruct")
    then = conversion_outlook(source).cache.at(2**20)
    assert 0.26 < then / cache_size(source).at(2**20) < 0.27


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": 20}, {"tie_word_embeddings": True}])
def test_outlook_agrees_with_the_plan(fields, tmp_path):
    config = tiny_config("deepseek_v3", dtype="bfloat16", **fields)
    outlook = conversion_outlook(config)
    plan = plan_conversion(write_tiny_checkpoint(tmp_path, config), Recipe())
    assert isinstance(outlook, Outlook)
    assert outlook.output_bytes == plan.shards.total_size
    assert outlook.kda_layers == len(plan.target_config.kda_layers)
    assert outlook.to_json()["cache"]["bytes_at"].keys() == {
        str(n * 1024) for n in (4, 16, 64, 256, 1024)
    }


def test_what_cannot_be_converted_says_why():
    found = conversion_outlook(tiny_config("kimi_linear"))
    assert isinstance(found, ConfigError)
    assert "cannot be converted" in found.message
