"""The KDA mixer: against the report's equations, its forms, its pieces, its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kimi_convert.model.cache import KdaCache
from kimi_convert.model.kda import KdaForm, KimiDeltaAttention
from kimi_convert.model.numerics import SERVED
from tests.tiny import linear_attn_config, tiny_config
from tests.unit.model.build import random_hidden, random_layer, relative_error

CONFIGS = {
    "four-taps": tiny_config("kimi_linear"),
    "one-head-two-taps": tiny_config(
        "kimi_linear", linear_attn_config=linear_attn_config(4, num_heads=1, conv_size=2)
    ),
}
FORMS = [KdaForm.CHUNK, KdaForm.RECURRENT]
# fp64 rounds at 1e-16; the recurrence multiplies errors of a few hundred steps.
FP64_BOUND = 1e-11


@pytest.fixture(params=CONFIGS, ids=str)
def config(request):
    return CONFIGS[request.param]


def mixer(tmp_path, config, dtype=torch.float64) -> KimiDeltaAttention:
    kda = random_layer(tmp_path, config, 1, dtype=dtype).kda
    assert kda is not None
    return kda


def by_equations(kda: KimiDeltaAttention, x: torch.Tensor) -> torch.Tensor:
    """Mix the tokens of one sequence [T, D] one after another, written from the report."""
    heads, length = kda.num_heads, len(x)
    weights = dict(kda.named_parameters())

    def conv(name: str) -> torch.Tensor:
        projected, taps = x @ weights[f"{name}.weight"].T, weights[f"{name}_conv.weight"][:, 0]
        padded = F.pad(projected, (0, 0, taps.shape[1] - 1, 0))
        mixed = sum(padded[w : w + length] * taps[:, w] for w in range(taps.shape[1]))
        return F.silu(mixed).view(length, heads, -1)

    def unit(vectors: torch.Tensor) -> torch.Tensor:
        return vectors / (vectors.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    q, k, v = unit(conv("q")), unit(conv("k")), conv("v")
    f = x @ weights["f_a.weight"].T @ weights["f_b.weight"].T + weights["dt_bias"]
    rate = weights["A_log"].flatten().exp()[:, None]
    alpha = (-rate * F.softplus(f.view(length, heads, -1))).exp()
    beta = (x @ weights["b.weight"].T).sigmoid()
    state = torch.zeros(heads, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(length):
        forget = torch.eye(q.shape[-1], dtype=x.dtype) - beta[t, :, None, None] * (
            k[t, :, :, None] * k[t, :, None, :]
        )
        write = beta[t, :, None, None] * k[t, :, :, None] * v[t, :, None, :]
        state = forget @ (alpha[t, :, :, None] * state) + write
        outputs.append((state * q[t, :, :, None]).sum(1) * q.shape[-1] ** -0.5)
    mixed = torch.stack(outputs)
    normed = (
        mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["o_norm.weight"]
    )
    gate = (x @ weights["g_a.weight"].T @ weights["g_b.weight"].T).view_as(normed)
    return (normed * gate.sigmoid()).flatten(1) @ weights["o.weight"].T


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 63, 65])
def test_mixer_is_the_report_s_equations(length, form, config, tmp_path):
    kda, x = mixer(tmp_path, config), random_hidden(config, length, dtype=torch.float64)
    expected = torch.stack([by_equations(kda, sequence) for sequence in x])
    assert relative_error(kda(x, form=form), expected) < FP64_BOUND


@pytest.mark.parametrize("form", [*KdaForm])
@pytest.mark.parametrize(
    "pieces", [[1] * 70, [64, 6], [2, 1, 66, 1]], ids=["tokens", "64-6", "mixed"]
)
def test_pieces_and_single_tokens_agree_with_one_prefill(pieces, form, config, tmp_path):
    kda, cache = mixer(tmp_path, config), KdaCache()
    x = random_hidden(config, 70, dtype=torch.float64)
    mixed = torch.cat([kda(piece, cache, form=form) for piece in x.split(pieces, 1)], 1)
    assert relative_error(mixed, kda(x)) < FP64_BOUND


def test_auto_is_recurrent_for_one_token_and_chunk_for_many(tmp_path):
    config = CONFIGS["four-taps"]
    kda = mixer(tmp_path, config, torch.float32)
    for length, form in ((1, KdaForm.RECURRENT), (200, KdaForm.CHUNK)):
        x = random_hidden(config, length)
        assert torch.equal(kda(x), kda(x, form=form))


def test_cache_has_a_constant_size_and_an_fp32_state_in_a_bf16_model(tmp_path):
    config = CONFIGS["four-taps"]
    kda, cache, sizes = mixer(tmp_path, config, torch.bfloat16), KdaCache(), set()
    for length in (1, 5, 80):
        kda(random_hidden(config, length, dtype=torch.bfloat16), cache)
        sizes.add(cache.nbytes)
    assert cache.state is not None
    assert cache.state.dtype is torch.float32
    assert cache.state.shape == (2, 4, 16, 16)
    assert cache.q_conv is not None
    assert cache.q_conv.shape == (2, 64, 3)
    # 2 sequences x (4 heads x 16 x 16 fp32 + 3 convolutions x 64 channels x 3 bf16)
    assert sizes == {2 * (4 * 16 * 16 * 4 + 3 * 64 * 3 * 2)}


def test_decay_parameters_stay_fp32_in_a_bf16_model(tmp_path):
    kda = mixer(tmp_path, CONFIGS["four-taps"], torch.bfloat16)
    assert {kda.A_log.dtype, kda.dt_bias.dtype} == {torch.float32}
    assert kda.q.weight.dtype is torch.bfloat16


def test_bf16_error_is_that_of_rounded_weights_and_activations(tmp_path):
    config = CONFIGS["four-taps"]
    exact = mixer(tmp_path, config)
    rounded = mixer(tmp_path, config, torch.bfloat16)
    x = random_hidden(config, 80, dtype=torch.bfloat16)
    # bf16 rounds at 2^-9; about ten roundings on the way, of which few add up.
    assert relative_error(rounded(x).double(), exact(x.double())) < 10 * 2**-9


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_input_and_every_weight(form, config, tmp_path):
    kda = mixer(tmp_path, config).requires_grad_()
    x = random_hidden(config, 66, dtype=torch.float64).requires_grad_()
    kda(x, form=form).square().sum().backward()
    for tensor in (x, *kda.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def test_served_output_norm_ignores_the_config_s_eps(tmp_path):
    config = tiny_config("kimi_linear", rms_norm_eps=1e-3)
    assert mixer(tmp_path, config).o_norm.eps == SERVED.o_norm_eps == 1e-5
