"""Rotation against complex numbers, and what YaRN does to frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_convert.config.architecture import RopeConfig, YarnConfig
from kimi_convert.model.rope import rope_frequencies, rotate, rotation_at

DIM = 16
PLAIN = RopeConfig(theta=10000.0)
YARN = YarnConfig(factor=40.0, original_max_positions=4096, mscale_all_dim=1.0)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_interleaved_pairs_turn_as_complex_numbers():
    x, positions = random(2, 5, 3, DIM), torch.arange(5)
    angles = positions[:, None] * rope_frequencies(PLAIN, dim=DIM)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.complex128)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn)
    turned = rotate(x, rotation_at(PLAIN, positions, dim=DIM), interleaved=True)
    # The angles are fp32 on both sides; their cosines round at 6e-8.
    torch.testing.assert_close(turned, expected.flatten(-2), rtol=0, atol=1e-6)


def test_half_split_is_the_interleaved_rotation_of_reordered_dims():
    x, rotation = random(1, 4, 2, DIM), rotation_at(PLAIN, torch.arange(4), dim=DIM)
    order = torch.arange(DIM).unflatten(0, (-1, 2)).T.flatten()  # 0, 2, 4, ..., 1, 3, 5, ...
    interleaved = rotate(x, rotation, interleaved=True)[..., order]
    assert torch.equal(rotate(x[..., order], rotation, interleaved=False), interleaved)


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 500))
@settings(max_examples=30, deadline=None)
def test_scores_depend_on_the_distance_alone(first, second, shift):
    q, k = random(2, 1, 1, 1, DIM).unbind(0)

    def score(at_q: int, at_k: int) -> float:
        turned = [
            rotate(x, rotation_at(PLAIN, torch.tensor([at]), dim=DIM), interleaved=True)
            for x, at in ((q, at_q), (k, at_k))
        ]
        return (turned[0] * turned[1]).sum().item()

    # fp32 angles of up to 2500 round at 1.2e-4; |q| |k| is below 30.
    assert math.isclose(
        score(first, second), score(first + shift, second + shift), abs_tol=30 * 2.5e-4
    )


def test_result_has_the_dtype_of_the_input_and_starts_unrotated():
    x = random(1, 3, 1, DIM, dtype=torch.bfloat16)
    turned = rotate(x, rotation_at(PLAIN, torch.arange(3), dim=DIM), interleaved=True)
    assert turned.dtype is torch.bfloat16
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.equal(turned[:, 1], x[:, 1])


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_ramps_between():
    dim = 64
    plain = rope_frequencies(PLAIN, dim=dim)
    slowed = rope_frequencies(RopeConfig(theta=10000.0, yarn=YARN), dim=dim)
    ratio = plain / slowed
    turns = YARN.original_max_positions * plain / (2 * math.pi)
    fast, slow = turns > YARN.beta_fast * 1.5, turns < YARN.beta_slow / 1.5
    assert fast.any()
    assert slow.any()
    torch.testing.assert_close(ratio[fast], torch.ones_like(ratio[fast]))
    torch.testing.assert_close(ratio[slow], torch.full_like(ratio[slow], YARN.factor))
    assert (ratio[~fast & ~slow].diff() > 0).all()


def test_yarn_of_factor_one_changes_nothing():
    yarn = YarnConfig(factor=1.0, original_max_positions=4096)
    scaled = RopeConfig(theta=10000.0, yarn=yarn)
    torch.testing.assert_close(rope_frequencies(scaled, dim=DIM), rope_frequencies(PLAIN, dim=DIM))


def test_yarn_ramp_of_no_width_is_a_step():
    yarn = YarnConfig(factor=40.0, original_max_positions=6, beta_fast=1.0, beta_slow=1.0)
    ratio = rope_frequencies(PLAIN, dim=DIM) / rope_frequencies(
        RopeConfig(theta=10000.0, yarn=yarn), dim=DIM
    )
    assert ratio.isfinite().all()
    torch.testing.assert_close(ratio[1:], torch.full_like(ratio[1:], 40.0))


@pytest.mark.parametrize(("mscale", "all_dim"), [(1.0, 0.0), (1.0, 0.707), (0.707, 0.707)])
def test_yarn_scales_cosine_and_sine_by_its_rotation_factor(mscale, all_dim):
    yarn = YarnConfig(
        factor=40.0, original_max_positions=4096, mscale=mscale, mscale_all_dim=all_dim
    )
    rotation = rotation_at(RopeConfig(theta=10000.0, yarn=yarn), torch.arange(3), dim=DIM)
    expected = (0.1 * mscale * math.log(40) + 1) / (0.1 * all_dim * math.log(40) + 1)
    torch.testing.assert_close(rotation.cos[0], torch.full((DIM // 2,), expected))
