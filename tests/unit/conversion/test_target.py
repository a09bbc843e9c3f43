"""The hybrid's config: what it takes over, what it lays down, and what cannot become one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kimi_convert.config.architecture import Scoring, TopkMethod
from kimi_convert.config.huggingface import config_to_json, parse_config
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.target import target_config
from kimi_convert.errors import ConfigError, RecipeError
from tests.tiny import tiny_config

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0}
KINDS = ("deepseek_v2", "deepseek_v3", "kimi_k2")


@pytest.mark.parametrize("kind", KINDS)
def test_hybrid_has_the_sizes_of_its_teacher(kind):
    source = tiny_config(kind, q_lora_rank=20, rope_scaling=YARN, num_nextn_predict_layers=1)
    target = target_config(source, Recipe(short_conv_size=3))
    assert target.model_type == "kimi_linear"
    assert target.mla == replace(source.mla, rope=None)
    assert (target.kda.num_heads, target.kda.head_dim, target.kda.conv_size) == (4, 16, 3)
    assert (target.num_mtp_layers, target.quantization, target.carried) == (0, None, {})
    same = (
        "hidden_size",
        "num_layers",
        "vocab_size",
        "intermediate_size",
        "rms_norm_eps",
        "max_positions",
        "dtype",
        "initializer_range",
        "bos_token_id",
        "eos_token_ids",
        "pad_token_id",
    )
    assert [getattr(target, name) for name in same] == [getattr(source, name) for name in same]


@pytest.mark.parametrize("kind", KINDS)
def test_hybrid_survives_its_own_config_json(kind):
    target = target_config(tiny_config(kind, num_hidden_layers=9), Recipe())
    read = parse_config(config_to_json(target))
    assert replace(read, carried={}) == target


def test_routing_is_the_teachers_with_a_correction_bias():
    source = tiny_config("deepseek_v2", routed_scaling_factor=2.5)
    target = target_config(source, Recipe())
    assert source.moe.topk_method is TopkMethod.GREEDY
    assert target.moe == replace(source.moe, topk_method=TopkMethod.NOAUX_TC)
    assert target.moe.scoring is Scoring.SOFTMAX


def test_model_without_experts_stays_without():
    source = replace(tiny_config("deepseek_v3"), moe=None)
    assert target_config(source, Recipe()).moe is None


def test_output_matrix_is_never_tied():
    source = tiny_config("deepseek_v3", tie_word_embeddings=True)
    assert not target_config(source, Recipe()).tie_word_embeddings


@pytest.mark.parametrize(
    ("num_layers", "mla_layers"),
    [
        (2, (1,)),
        (4, (3,)),
        (5, (3, 4)),
        (8, (3, 7)),
        # Kimi-Linear-48B-A3B: 4, 8, 12, 16, 20, 24 and 27 counted from 1.
        (27, (3, 7, 11, 15, 19, 23, 26)),
        (61, (*range(3, 61, 4), 60)),
    ],
)
def test_released_pattern_fits_any_depth(num_layers, mla_layers):
    target = target_config(tiny_config("deepseek_v3", num_hidden_layers=num_layers), Recipe())
    assert target.mla_layers == mla_layers
    assert set(target.kda_layers) == set(range(num_layers)) - set(mla_layers)


@pytest.mark.parametrize("keep", [(), (0,), (0, 2), (1, 2, 3)], ids=str)
def test_listed_layers_are_kept(keep):
    assert target_config(tiny_config("deepseek_v3"), Recipe(keep_layers=keep)).mla_layers == keep


@pytest.mark.parametrize("keep", [(4,), (-1,), (0, 1, 2, 3)], ids=str)
def test_recipe_that_does_not_fit_the_depth_is_refused(keep):
    with pytest.raises(RecipeError, match=r"layers\.keep"):
        target_config(tiny_config("deepseek_v3"), Recipe(keep_layers=keep))


def test_single_layer_is_refused_as_it_would_be_kept():
    with pytest.raises(RecipeError, match="no layer to convert"):
        target_config(tiny_config("deepseek_v3", num_hidden_layers=1), Recipe())


def test_hybrid_is_not_converted_again():
    with pytest.raises(ConfigError, match="cannot be converted") as caught:
        target_config(tiny_config("kimi_linear"), Recipe())
    assert "deepseek_v3" in caught.value.expected
    assert caught.value.found == "kimi_linear"


def test_values_of_another_width_are_refused():
    with pytest.raises(ConfigError, match="heads") as caught:
        target_config(tiny_config("deepseek_v3", v_head_dim=32), Recipe())
    assert caught.value.found == "16 and 32"


def test_groups_ranked_by_their_best_expert_are_refused():
    fields = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    with pytest.raises(ConfigError, match="routing") as caught:
        target_config(tiny_config("deepseek_v2", **fields), Recipe())
    assert caught.value.found == "group_limited_greedy"
