"""What caches hold, how they grow, and that they start empty."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.model.cache import KdaCache, MlaCache, new_cache
from tests.tiny import tiny_config

CONFIG = tiny_config("kimi_linear")
WIDTH = CONFIG.mla.kv_lora_rank + CONFIG.mla.qk_rope_head_dim


def empty() -> MlaCache:
    return MlaCache(2, CONFIG, dtype=torch.float32, device=torch.device("cpu"))


@given(st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_append_returns_everything_in_order(lengths):
    cache = empty()
    pieces = [torch.randn(2, length, WIDTH) for length in lengths]
    kept = [cache.append(piece) for piece in pieces][-1]
    assert torch.equal(kept, torch.cat(pieces, 1))
    assert cache.length == sum(lengths)


def test_one_token_steps_copy_a_linear_number_of_rows():
    cache, storages = empty(), set()
    for _ in range(1000):
        storages.add(cache.append(torch.zeros(2, 1, WIDTH)).untyped_storage().data_ptr())
    # 64, 128, 256, 512, 1024: freed storage may be reused, so at most five addresses.
    assert len(storages) <= 5
    assert cache.nbytes == 2 * 1024 * WIDTH * 4


def test_long_prefill_reserves_what_it_needs():
    cache = empty()
    cache.append(torch.zeros(2, 1000, WIDTH))
    assert cache.nbytes == 2 * 1000 * WIDTH * 4


def test_rows_are_copied_and_detached():
    rows = torch.zeros(2, 3, WIDTH, requires_grad=True)
    kept = empty().append(rows)
    assert not kept.requires_grad
    rows.data.fill_(1.0)
    assert not kept.any()


def test_new_cache_has_the_kind_of_each_layer():
    cache = new_cache(CONFIG, 2, dtype=torch.float32)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [KdaCache, KdaCache, KdaCache, MlaCache]
    assert (cache.position, cache.nbytes) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_dtype_asked_for(dtype):
    cache = new_cache(tiny_config("deepseek_v3"), 1, dtype=dtype).layers[0]
    assert isinstance(cache, MlaCache)
    assert cache.append(torch.zeros(1, 1, WIDTH, dtype=dtype)).dtype is dtype


def test_kda_cache_counts_what_it_keeps():
    cache = KdaCache(state=torch.zeros(1, 2, 4, 4), q_conv=torch.zeros(1, 8, 3))
    assert cache.nbytes == (32 + 24) * 4
