"""The hybrid as a whole: forms, caches, batches, extreme gates, gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kimi_convert.config.architecture import RopeConfig
from kimi_convert.errors import ConfigError
from kimi_convert.model.cache import new_cache
from kimi_convert.model.kda import KdaForm
from kimi_convert.model.kimi_linear import KimiLinear
from kimi_convert.model.loading import load_model
from tests.tiny import linear_attn_config, tiny_config, write_tiny_checkpoint
from tests.unit.model.build import relative_error

# One KDA and one MLA layer: a thousand one-token steps stay quick.
CONFIG = tiny_config(
    "kimi_linear",
    num_hidden_layers=2,
    linear_attn_config=linear_attn_config(2, [1], num_heads=2),
)
LENGTHS = [1, 63, 64, 65, 1000]
# fp32 rounds at 6e-8; the forms differ in the order of sums of some hundred terms.
FP32_BOUND = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_tiny_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, seed=4))


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    """Return a model whose log decay is about -20 per token: from -5 to -60."""
    folder = tmp_path_factory.mktemp("forgetful")
    model = load_model(write_tiny_checkpoint(folder, CONFIG, seed=4))
    kda = model.layers[0].kda
    kda.A_log.data.fill_(math.log(20.0))
    kda.dt_bias.data.fill_(math.log(math.e - 1.0))  # softplus of it is 1
    return model


def tokens_of(length: int, batch_size: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(CONFIG.vocab_size, (batch_size, length), generator=generator)


@torch.inference_mode()
def in_pieces(model, tokens, pieces, form=KdaForm.AUTO):
    cache = new_cache(model.config, len(tokens), dtype=model.embed.weight.dtype)
    logits = torch.cat([model(one, cache, kda_form=form) for one in tokens.split(pieces, 1)], 1)
    assert cache.position == tokens.shape[1]
    return logits


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gates", ["model", "forgetful"])
def test_chunked_recurrent_and_cached_decode_agree(gates, length, request):
    model, tokens = request.getfixturevalue(gates), tokens_of(length)
    with torch.inference_mode():
        chunked = model(tokens, kda_form=KdaForm.CHUNK)
        recurrent = model(tokens, kda_form=KdaForm.RECURRENT)
    decoded = in_pieces(model, tokens, 1)
    assert chunked.isfinite().all()
    assert relative_error(chunked, recurrent) <= FP32_BOUND
    assert relative_error(decoded, recurrent) <= FP32_BOUND


def test_gates_of_the_forgetful_model_reach_minus_twenty(forgetful):
    x = forgetful.layers[0].input_norm(forgetful.embed(tokens_of(100)))
    kda = forgetful.layers[0].kda
    g = kda.gate_law().log_decay(kda._heads(kda.f_b(kda.f_a(x))))
    assert g.mean() < -20
    assert g.min() < -40


@pytest.mark.parametrize("form", [KdaForm.CHUNK, KdaForm.RECURRENT])
@pytest.mark.parametrize("pieces", [[64, 64, 2], [1, 100, 1, 28], [5, 125]], ids=str)
def test_prefill_in_pieces_agrees_with_one_prefill(pieces, form, model):
    tokens = tokens_of(130)
    with torch.inference_mode():
        whole = model(tokens)
    assert relative_error(in_pieces(model, tokens, pieces, form), whole) <= FP32_BOUND


def test_sequences_of_a_batch_do_not_meet(model):
    tokens = tokens_of(70, batch_size=3)
    with torch.inference_mode():
        together = model(tokens)
        alone = torch.cat([model(one[None]) for one in tokens])
    assert relative_error(together, alone) <= FP32_BOUND


def test_logits_depend_on_no_later_token(model):
    tokens = tokens_of(90)
    changed = tokens.clone()
    changed[:, 80:] = (changed[:, 80:] + 1) % CONFIG.vocab_size
    with torch.inference_mode():
        before, after = model(tokens), model(changed)
    assert relative_error(before[:, :80], after[:, :80]) <= FP32_BOUND
    assert relative_error(before[:, 80:], after[:, 80:]) > 1e-2


def test_fp32_is_as_exact_as_its_rounding(model, tmp_path):
    write_tiny_checkpoint(tmp_path, CONFIG, seed=4)
    exact = load_model(tmp_path, dtype=torch.float64)
    tokens = tokens_of(200)
    with torch.inference_mode():
        assert exact(tokens).dtype is torch.float64
        assert relative_error(model(tokens).double(), exact(tokens)) <= FP32_BOUND


def test_bf16_model_gives_fp32_logits(tmp_path):
    write_tiny_checkpoint(tmp_path, CONFIG, seed=4)
    rounded = load_model(tmp_path, dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = rounded(tokens_of(20))
    assert logits.dtype is torch.float32
    assert in_pieces(rounded, tokens_of(20), [10, 1, 9]).shape == logits.shape


def test_state_dict_keys_are_parameter_names_with_stacked_experts(model):
    keys = set(model.state_dict())
    assert {"embed.weight", "layers.0.kda.A_log", "layers.0.kda.q_conv.weight"} < keys
    assert {"layers.1.mla.kv_a_norm.weight", "layers.1.moe.experts.gate"} < keys
    assert {"layers.0.mlp.gate.weight", "norm.weight", "head.weight"} < keys
    assert not [key for key in keys if key.startswith("head.") and key != "head.weight"]


def test_gradients_reach_every_weight_but_the_correction_bias(tmp_path):
    write_tiny_checkpoint(tmp_path, CONFIG, seed=4)
    model = load_model(tmp_path).requires_grad_()
    model(tokens_of(66)).square().mean().backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without == {"layers.1.moe.router.bias"}
    assert all(
        weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None
    )


def test_a_config_that_rotates_is_refused():
    rotating = replace(CONFIG, mla=replace(CONFIG.mla, rope=RopeConfig(theta=10000.0)))
    with pytest.raises(ConfigError, match="rotary"):
        KimiLinear(rotating, dtype=torch.float32)
