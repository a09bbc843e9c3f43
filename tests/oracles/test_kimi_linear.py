"""KimiLinear against transformers' KimiLinearForCausalLM, under its numerics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kimi_convert.config.huggingface import read_config
from kimi_convert.model.cache import new_cache
from kimi_convert.model.kda import KdaForm
from kimi_convert.model.loading import load_model
from kimi_convert.model.numerics import SERVED, TRANSFORMERS
from tests.oracles.comparison import FP32_BOUND, load_theirs, random_tokens, relative_error
from tests.tiny import linear_attn_config, tiny_config, write_tiny_checkpoint

transformers = pytest.importorskip("transformers")


@torch.inference_mode()
def logits_of_both(folder: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    theirs = load_theirs(transformers.KimiLinearForCausalLM, folder)
    return load_model(folder, numerics=TRANSFORMERS)(tokens), theirs(
        tokens, use_cache=False
    ).logits


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="released-pattern"),
        pytest.param({"q_lora_rank": 20}, id="q_lora"),
        pytest.param({"num_hidden_layers": 5}, id="five-layers-first-dense"),
        pytest.param({"first_k_dense_replace": 0}, id="no-dense-layer"),
        pytest.param({"first_k_dense_replace": 2, "q_lora_rank": 20}, id="two-dense-layers"),
        pytest.param(
            {"linear_attn_config": linear_attn_config(4, [0, 2], num_heads=2, head_dim=24)},
            id="mla-first-alternating-other-heads",
        ),
        pytest.param({"linear_attn_config": linear_attn_config(4, [])}, id="kda-only"),
        pytest.param(
            {"linear_attn_config": linear_attn_config(4, [3], conv_size=2)}, id="conv-of-two"
        ),
        pytest.param(
            {"num_expert_group": 4, "topk_group": 2, "moe_renormalize": False},
            id="groups-not-renormalized",
        ),
        pytest.param({"num_shared_experts": 0}, id="no-shared-expert"),
        pytest.param({"num_shared_experts": 2, "rms_norm_eps": 1e-3}, id="two-shared-large-eps"),
    ],
)
def test_random_hybrids_agree(fields, tmp_path):
    config = tiny_config("kimi_linear", **fields)
    write_tiny_checkpoint(tmp_path, config, seed=5)
    ours, theirs = logits_of_both(tmp_path, random_tokens(config.vocab_size, 2, 150))
    assert relative_error(ours, theirs) <= FP32_BOUND


def test_served_numerics_are_not_those_of_transformers(tmp_path):
    config = tiny_config("kimi_linear", rms_norm_eps=1e-3)
    write_tiny_checkpoint(tmp_path, config, seed=5)
    tokens = random_tokens(config.vocab_size, 2, 150)
    _, theirs = logits_of_both(tmp_path, tokens)
    with torch.inference_mode():
        served = load_model(tmp_path, numerics=SERVED)(tokens)
    assert relative_error(served, theirs) > 10 * FP32_BOUND


@pytest.mark.parametrize("form", [KdaForm.CHUNK, KdaForm.RECURRENT])
def test_prefill_then_decode_agrees_with_their_prefill(form, tmp_path):
    config = tiny_config("kimi_linear")
    write_tiny_checkpoint(tmp_path, config, seed=6)
    tokens = random_tokens(config.vocab_size, 2, 80)
    theirs = load_theirs(transformers.KimiLinearForCausalLM, tmp_path)
    ours = load_model(tmp_path, numerics=TRANSFORMERS)
    cache = new_cache(config, 2, dtype=torch.float32)
    with torch.inference_mode():
        pieces = [
            ours(piece, cache, kda_form=form) for piece in tokens.split([65, 12, 1, 1, 1], 1)
        ]
        assert (
            relative_error(torch.cat(pieces, 1), theirs(tokens, use_cache=False).logits)
            <= FP32_BOUND
        )


def test_decay_parameters_and_beta_round_as_theirs_in_bf16(tmp_path):
    config = tiny_config("kimi_linear")
    write_tiny_checkpoint(tmp_path, config, seed=5)
    theirs = load_theirs(transformers.KimiLinearForCausalLM, tmp_path, torch.bfloat16)
    ours = load_model(tmp_path, dtype=torch.bfloat16, numerics=TRANSFORMERS)
    kda, their_kda = ours.layers[0].kda, theirs.model.layers[0].self_attn
    assert torch.equal(kda.A_log, their_kda.forget_gate.A_log)
    assert torch.equal(kda.dt_bias, their_kda.forget_gate.dt_bias)
    served = load_model(tmp_path, dtype=torch.bfloat16, numerics=SERVED)
    assert not torch.equal(served.layers[0].kda.A_log, their_kda.forget_gate.A_log.float())


def randomised_native_model(**fields: object):
    config = transformers.KimiLinearConfig(
        hidden_size=32,
        num_hidden_layers=3,
        vocab_size=96,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=12,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=3,
        linear_head_dim=16,
        linear_num_heads=2,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )
    torch.manual_seed(11)
    model = transformers.KimiLinearForCausalLM(config).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        scale = tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.3
        tensor.data.copy_(torch.randn_like(tensor) * scale + 0.5 * (tensor.ndim == 1))
    return model


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_checkpoint_saved_by_transformers_loads_and_agrees(q_lora_rank, tmp_path):
    model = randomised_native_model(q_lora_rank=q_lora_rank)
    model.save_pretrained(tmp_path)
    assert "linear_attn_config" not in (tmp_path / "config.json").read_text()
    assert read_config(tmp_path).kda_layers == (0, 2)
    tokens = random_tokens(96, 2, 70)
    with torch.inference_mode():
        ours = load_model(tmp_path, numerics=TRANSFORMERS)(tokens)
        assert relative_error(ours, model(tokens, use_cache=False).logits) <= FP32_BOUND
