"""Latent attention: against its formula, its two forms, its pieces, its memory."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_convert.model.cache import MlaCache
from kimi_convert.model.mla import MultiHeadLatentAttention, causal_attention
from tests.tiny import tiny_config
from tests.unit.model.build import LargestTensor, random_hidden, random_layer, relative_error

YARN = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CONFIGS = {
    "rope": tiny_config("deepseek_v3"),
    "yarn-q_lora": tiny_config("deepseek_v3", q_lora_rank=20, rope_scaling=YARN),
    "nope": tiny_config("kimi_linear"),
    "nope-q_lora-wide-values": tiny_config("kimi_linear", q_lora_rank=20, v_head_dim=32),
}
# fp64 rounds at 1e-16; a few hundred operations deep.
FP64_BOUND = 1e-12


@pytest.fixture(params=CONFIGS, ids=str)
def config(request):
    return CONFIGS[request.param]


def mixer(tmp_path, config, dtype=torch.float64) -> MultiHeadLatentAttention:
    mla = random_layer(tmp_path, config, 3, dtype=dtype).mla
    assert mla is not None
    return mla


def empty_cache(config, dtype=torch.float64) -> MlaCache:
    return MlaCache(2, config, dtype=dtype, device=torch.device("cpu"))


def naive_attention(q, k, v, scale):
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(future, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("past", [0, 1, 7, 600])
@pytest.mark.parametrize("widths", [(24, 16), (16, 16), (16, 24)], ids=str)
def test_causal_attention_is_the_formula(past, widths):
    generator = torch.Generator().manual_seed(0)
    key, value = widths
    q = torch.randn(2, 530, 2, key, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 530 + past, 2, key, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 530 + past, 2, value, generator=generator, dtype=torch.float64)
    ours = causal_attention(q, k, v, scale=0.3)
    assert relative_error(ours, naive_attention(q, k, v, 0.3)) < FP64_BOUND


@pytest.mark.parametrize("past", [0, 1024])
@pytest.mark.parametrize("trained", [False, True])
def test_attention_makes_no_matrix_of_tokens_by_tokens(past, trained):
    tokens, heads, width = 2048, 2, 16
    shape = (1, tokens + past, heads, width)
    q, k, v = (torch.randn(shape, requires_grad=trained) for _ in range(3))
    with LargestTensor() as largest:
        mixed = causal_attention(q[:, past:], k, v[..., :8], scale=0.3)
        if trained:
            mixed.sum().backward()
    # The largest is the mask of one block of 512 queries, as fp32.
    assert largest.nbytes <= 512 * (tokens + past) * 4


@pytest.mark.parametrize(
    "pieces", [[40], [1] * 40, [17, 1, 1, 20, 1]], ids=["whole", "tokens", "mixed"]
)
def test_pieces_and_single_tokens_agree_with_one_prefill(pieces, config, tmp_path):
    mla, cache = mixer(tmp_path, config), empty_cache(config)
    x = random_hidden(config, 40, dtype=torch.float64)
    mixed = torch.cat([mla(piece, cache) for piece in x.split(pieces, 1)], 1)
    assert relative_error(mixed, mla(x)) < FP64_BOUND


def test_one_token_does_not_expand_the_latents_of_all(config, tmp_path):
    mla, cache = mixer(tmp_path, config), empty_cache(config)
    x = random_hidden(config, 501, dtype=torch.float64)
    mla(x[:, :500], cache)
    cache.append(torch.zeros(2, 1, 20))  # to grow it before it is measured
    with LargestTensor() as largest:
        mla(x[:, 500:], cache)
    assert largest.nbytes <= cache.nbytes


def test_output_depends_on_no_later_token(config, tmp_path):
    mla, x = mixer(tmp_path, config), random_hidden(config, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 8:] += 1.0
    assert torch.equal(mla(x)[:, :8], mla(changed)[:, :8])
    assert not torch.equal(mla(x)[:, 8:], mla(changed)[:, 8:])


@pytest.mark.parametrize(("kind", "moves"), [("rope", True), ("nope", False)])
def test_only_rotation_tells_where_equal_tokens_stand(kind, moves, tmp_path):
    config = CONFIGS[kind]
    mla, x = mixer(tmp_path, config), random_hidden(config, 6, dtype=torch.float64)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    last, last_swapped = mla(x)[:, -1], mla(swapped)[:, -1]
    assert (relative_error(last, last_swapped) > 1e-3) == moves


def test_yarn_multiplies_the_softmax_scale_by_m_squared():
    sizes = CONFIGS["yarn-q_lora"].mla
    m = 0.1 * math.log(40) + 1
    assert sizes.softmax_scale == pytest.approx(24**-0.5 * m**2)


def test_bf16_decode_is_as_exact_as_bf16_prefill(tmp_path):
    config = CONFIGS["nope"]
    exact = mixer(tmp_path, config)
    rounded = mixer(tmp_path, config, torch.bfloat16)
    x = random_hidden(config, 50, dtype=torch.bfloat16)
    cache, expected = empty_cache(config, torch.bfloat16), exact(x.double())
    decoded = torch.cat([rounded(token, cache) for token in x.split(1, 1)], 1)
    prefill_error = relative_error(rounded(x).double(), expected)
    assert relative_error(decoded.double(), expected) <= 2 * prefill_error


def test_gradients_reach_input_and_every_weight(config, tmp_path):
    mla = mixer(tmp_path, config).requires_grad_()
    x = random_hidden(config, 9, dtype=torch.float64).requires_grad_()
    mla(x).square().sum().backward()
    for tensor in (x, *mla.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()
