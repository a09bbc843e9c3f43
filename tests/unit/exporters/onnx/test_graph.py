"""Graphs compute what the reference models do: every branch of a config, every form of a call."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_convert.errors import UsageError
from kimi_convert.exporters.onnx.export import export_onnx
from kimi_convert.exporters.onnx.options import (
    MlaForm,
    MoeForm,
    OnnxOptions,
    Target,
    WeightPlacement,
)
from kimi_convert.exporters.onnx.session import OnnxSession
from kimi_convert.model.loading import load_model
from tests.tiny import linear_attn_config, tiny_config, write_tiny_checkpoint
from tests.unit.exporters.onnx.comparison import (
    FP32_BOUND,
    error,
    reference_run,
    run_pieces,
    state_errors,
)

PIECES = {"prefill": (13,), "chunked": (1, 4, 6, 2), "decode": (1,) * 13}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A checkpoint with both kinds of mixers and of feed-forward, and its model."""
    folder = tmp_path_factory.mktemp("hybrid")
    config = tiny_config("kimi_linear", num_hidden_layers=4)
    write_tiny_checkpoint(folder, config, num_shards=1)
    return folder, load_model(folder)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 90, (2, 13))


@pytest.fixture(scope="module")
def session(hybrid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export_onnx(hybrid[0], folder)
    return OnnxSession(folder, threads=1)


@pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES)
def test_logits_and_states_are_those_of_the_reference(hybrid, session, tokens, sizes):
    _, model = hybrid
    wanted, cache = reference_run(model, tokens)
    logits, states = run_pieces(session, tokens, sizes)
    assert error(logits, wanted) <= FP32_BOUND
    assert max(state_errors(model, cache, states).values()) <= FP32_BOUND


def test_padding_on_the_left_changes_nothing(hybrid, session, tokens):
    _, model = hybrid
    lengths = (13, 8)
    padded = np.full_like(tokens, 2)
    mask = np.zeros_like(tokens)
    for row, length in enumerate(lengths):
        padded[row, -length:] = tokens[row, :length]
        mask[row, -length:] = 1
    states = session.new_states(2)
    logits = session.run(padded, states, mask)
    step = session.run(tokens[:, :1], states)
    for row, length in enumerate(lengths):
        alone = np.concatenate((tokens[row : row + 1, :length], tokens[row : row + 1, :1]), axis=1)
        wanted, cache = reference_run(model, alone)
        assert error(logits[row, -length:], wanted[0, :length]) <= FP32_BOUND
        assert error(step[row], wanted[0, length:]) <= FP32_BOUND
        recurrent = states.values["past_key_values.0.recurrent_state"].numpy()[row]
        assert error(recurrent, cache.layers[0].state[0].numpy()) <= FP32_BOUND


def test_padding_would_change_the_logits_without_the_mask(hybrid, session, tokens):
    _, model = hybrid
    padded = np.concatenate((np.full((2, 3), 2), tokens), axis=1)
    wanted, _ = reference_run(model, tokens)
    logits = session.run(padded, session.new_states(2))
    assert error(logits[:, 3:], wanted) > 100 * FP32_BOUND


BRANCHES = {
    "hybrid, one kind of mixer after the other": (
        "kimi_linear",
        {"linear_attn_config": linear_attn_config(3, (0,)), "num_hidden_layers": 3},
    ),
    "hybrid of KDA alone": (
        "kimi_linear",
        {"linear_attn_config": linear_attn_config(2, ()), "num_hidden_layers": 2},
    ),
    "hybrid with other KDA sizes": (
        "kimi_linear",
        {
            "num_hidden_layers": 2,
            "linear_attn_config": linear_attn_config(
                2, (1,), num_heads=3, head_dim=8, conv_size=2
            ),
        },
    ),
    "hybrid with convolutions of one tap": (
        "kimi_linear",
        {
            "num_hidden_layers": 2,
            "linear_attn_config": linear_attn_config(2, (1,), conv_size=1),
        },
    ),
    "hybrid with a low-rank q": ("kimi_linear", {"q_lora_rank": 20}),
    "hybrid without rope dims": ("kimi_linear", {"qk_rope_head_dim": 0}),
    "hybrid with values wider than keys": ("kimi_linear", {"v_head_dim": 40}),
    "hybrid with values as wide as keys": ("kimi_linear", {"v_head_dim": 24}),
    "hybrid with groups of experts": (
        "kimi_linear",
        {"num_expert_group": 4, "topk_group": 2},
    ),
    "hybrid without shared experts": ("kimi_linear", {"num_shared_experts": 0}),
    "hybrid, every second layer sparse": ("kimi_linear", {"moe_layer_freq": 2}),
    "hybrid, softmax router, not renormalised": (
        "kimi_linear",
        {"moe_router_activation_func": "softmax", "moe_renormalize": False},
    ),
    "hybrid, tied embedding": ("kimi_linear", {"tie_word_embeddings": True}),
    "hybrid in bf16": ("kimi_linear", {"dtype": "bfloat16"}),
    "Moonlight": ("deepseek_v3", {}),
    "DeepSeek-V3 with groups, low-rank q": (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "q_lora_rank": 20},
    ),
    "DeepSeek-V2": ("deepseek_v2", {}),
    "DeepSeek-V2 with groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "halves rotated": ("deepseek_v3", {"rope_interleave": False}),
    "YaRN": (
        "deepseek_v3",
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            }
        },
    ),
}
FORMS = {
    "copied": OnnxOptions(),
    "in place, own operators": OnnxOptions(
        target=Target.CUSTOM, weights=WeightPlacement.INPLACE, mla=MlaForm.LATENT
    ),
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("kind", "fields"), BRANCHES.values(), ids=BRANCHES)
def test_every_branch_of_a_config_exports(tmp_path, tokens, kind, fields, options):
    config = tiny_config(kind, **{"num_hidden_layers": 3, **fields})
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", config, num_shards=1)
    wanted, _ = reference_run(load_model(checkpoint), tokens)
    inplace = options.weights is WeightPlacement.INPLACE
    folder = checkpoint if inplace else tmp_path / "onnx"
    export_onnx(checkpoint, folder, options=options)
    logits, _ = run_pieces(OnnxSession(folder, threads=1), tokens, (6, 1, 6))
    assert error(logits, wanted) <= FP32_BOUND


@pytest.mark.parametrize("num_shards", [3, 5])
def test_experts_of_a_layer_may_lie_in_several_files(tmp_path, tokens, num_shards):
    config = tiny_config("kimi_linear", num_hidden_layers=2)
    checkpoint = write_tiny_checkpoint(tmp_path, config, num_shards=num_shards)
    wanted, _ = reference_run(load_model(checkpoint), tokens)
    export_onnx(checkpoint, checkpoint, options=FORMS["in place, own operators"])
    logits, _ = run_pieces(OnnxSession(checkpoint, threads=1), tokens, (13,))
    assert error(logits, wanted) <= FP32_BOUND


def test_last_logits_are_those_of_the_last_position(hybrid, session, tokens, tmp_path):
    options = OnnxOptions(last_logits=True, moe=MoeForm.ACTIVE)
    export_onnx(hybrid[0], tmp_path / "onnx", options=options)
    last = OnnxSession(tmp_path / "onnx", threads=1)
    logits = last.run(tokens, last.new_states(2))
    assert logits.shape == (2, 1, 96)
    assert error(logits[:, 0], session.run(tokens, session.new_states(2))[:, -1]) <= FP32_BOUND


@pytest.mark.parametrize("ids", [[[96]], [[-1]], [[]]], ids=["too large", "negative", "none"])
def test_tokens_that_cannot_be_run_are_refused(session, ids):
    with pytest.raises(UsageError, match="cannot be run"):
        session.run(np.array(ids, dtype=np.int64), session.new_states(1))
