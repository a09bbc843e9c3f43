"""Every option exists in both choices, and moves logits by the amount that its kind can."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from kimi_convert.model.loading import load_model
from kimi_convert.model.numerics import (
    RELEASED_CODE,
    SERVED,
    TRANSFORMERS,
    GroupFill,
    Numerics,
    Precision,
    QkNorm,
    RouterWeight,
)
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.model.build import relative_error

# Large enough that an eps of 1e-3 instead of 1e-5 or 1e-6 is seen, and far from rounding.
CONFIG = tiny_config("kimi_linear", rms_norm_eps=1e-3, num_expert_group=4, topk_group=2)
OTHER_CHOICES = {
    "router_weight": RouterWeight.BIASED,
    "latent_norm_eps": 1e-6,
    "qk_norm": QkNorm.FLOOR,
    "o_norm_eps": None,
    "beta": Precision.MODEL,
    "decay_parameters": Precision.MODEL,
    "group_fill": GroupFill.ZERO,
    "router": Precision.MODEL,
}
ROUNDING_ONLY = {"beta", "decay_parameters", "router"}


@torch.inference_mode()
def logits_under(numerics: Numerics, folder, dtype=torch.float32) -> torch.Tensor:
    tokens = torch.randint(96, (2, 60), generator=torch.Generator().manual_seed(0))
    return load_model(folder, dtype=dtype, numerics=numerics)(tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, seed=8)


def effect(folder, dtype=torch.float32, **choice: object) -> float:
    changed = replace(SERVED, **choice)
    return relative_error(
        logits_under(changed, folder, dtype), logits_under(SERVED, folder, dtype)
    )


def test_every_option_is_tested_here():
    assert {option.name for option in fields(Numerics)} == set(OTHER_CHOICES)
    assert all(getattr(SERVED, name) != other for name, other in OTHER_CHOICES.items())


def test_default_is_what_is_served():
    assert Numerics() == SERVED


def test_biased_router_weights_are_by_far_the_largest_split(folder):
    assert effect(folder, router_weight=RouterWeight.BIASED) > 1e-2


@pytest.mark.parametrize(
    ("choice", "least", "most"),
    [
        # Latents have mean squares near 1, which 1e-3 moves by 5e-4; a few layers add up.
        pytest.param({"latent_norm_eps": 1e-6}, 1e-5, 5e-2, id="latent_norm_eps"),
        # KDA outputs are small: q and k have unit length, and the scale is K^-1/2.
        pytest.param({"o_norm_eps": None}, 1e-3, 2.0, id="o_norm_eps"),
        # q and k have squared lengths near 1, which 16 x 1e-6 moves by 8e-6.
        pytest.param({"qk_norm": QkNorm.MEAN_EPS}, 1e-6, 1e-3, id="qk_norm-mean_eps"),
        # 1e-6 moves them by 5e-7.
        pytest.param({"qk_norm": QkNorm.FLOOR}, 1e-7, 1e-4, id="qk_norm-floor"),
    ],
)
def test_an_eps_moves_logits_by_its_share_of_what_it_is_added_to(choice, least, most, folder):
    assert least < effect(folder, torch.float64, **choice) < most


@pytest.mark.parametrize("qk_norm", [QkNorm.MEAN_EPS, QkNorm.FLOOR])
def test_unit_norms_part_where_vectors_are_short(qk_norm, tmp_path):
    folder = write_tiny_checkpoint(tmp_path, CONFIG, seed=8)
    tokens = torch.randint(96, (2, 60), generator=torch.Generator().manual_seed(0))
    logits = []
    for numerics in (SERVED, replace(SERVED, qk_norm=qk_norm)):
        model = load_model(folder, numerics=numerics)
        for layer_idx in CONFIG.kda_layers:
            model.layers[layer_idx].kda.k_conv.weight.mul_(1e-3)
        logits.append(model(tokens))
    assert relative_error(*logits) > 1e-2


@pytest.mark.parametrize("option", sorted(ROUNDING_ONLY))
def test_precision_options_change_bf16_and_nothing_in_fp32(option, folder):
    assert effect(folder, **{option: Precision.MODEL}) == 0
    changed = replace(SERVED, **{option: Precision.MODEL})
    served, other = (logits_under(one, folder, torch.bfloat16) for one in (SERVED, changed))
    assert not torch.equal(served, other)
    # A router that rounds chooses other experts now and then, so single logits may move far.
    assert (served - other).abs().median() < 2**-5 * served.abs().max()


def test_group_fill_matters_where_biased_scores_are_negative(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, CONFIG, seed=8)
    tokens = torch.randint(96, (2, 60), generator=torch.Generator().manual_seed(0))
    differences = []
    for shift in (1.0, -1.0):
        logits = []
        for fill in GroupFill:
            model = load_model(folder, numerics=Numerics(group_fill=fill))
            for layer_idx in CONFIG.moe_layers:
                model.layers[layer_idx].moe.router.bias.add_(shift)
            logits.append(model(tokens))
        differences.append(relative_error(*logits))
    assert differences[0] == 0
    assert differences[1] > 1e-2


def test_presets_differ_from_what_is_served_where_the_table_says():
    def parts(preset: Numerics) -> set[str]:
        names = {option.name for option in fields(Numerics)}
        return {name for name in names if getattr(preset, name) != getattr(SERVED, name)}

    assert parts(TRANSFORMERS) == {"latent_norm_eps", "o_norm_eps", "beta", "decay_parameters"}
    assert parts(RELEASED_CODE) == {"router_weight", "latent_norm_eps", "o_norm_eps", "group_fill"}
