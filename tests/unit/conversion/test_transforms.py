"""Every operation against its formula in fp64, written with loops over heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.rules import Op
from kimi_convert.conversion.transforms import TRANSFORMS, Job
from tests.tiny import tiny_config

# fp32 rounds at 6e-8. Products of two matrices sum at most 32 terms twice, a power sums as many
# squares: a few roundings of the largest term.
BOUND = 1e-6
H, NOPE, ROPE, V, D, R, QR = 4, 16, 8, 16, 32, 12, 20
YARN = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.9,
    "mscale_all_dim": 0.707,
}
# Unlike the defaults in every field, so that none can be mistaken for another.
RECIPE = Recipe(
    short_conv_size=3, qk_rms=5.0, v_rms=0.7, half_life_tokens=(0.5, 300.0), output_scale=0.3
)


def make(op, *sources, shape, recipe=RECIPE, target="layers.0.kda.x", **fields):
    job = Job(
        sources=tuple(source.clone() for source in sources),
        shape=shape,
        target=target,
        config=tiny_config("deepseek_v3", **fields),
        recipe=recipe,
    )
    made = TRANSFORMS[op](job)
    assert tuple(made.shape) == shape
    assert bool(made.isfinite().all())
    return made


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_weight(size, seed):
    return 1 + 0.3 * noise(size, seed=seed)


def close(found, expected):
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    return (found.double() - expected).abs().max() <= BOUND * expected.abs().max()


INPUT_NORM = norm_weight(D, 1)
Q = noise(H * (NOPE + ROPE), D, seed=2)
Q_A, Q_A_NORM, Q_B = noise(QR, D, seed=3), norm_weight(QR, 4), noise(H * (NOPE + ROPE), QR, seed=5)
KV_A, KV_A_NORM = noise(R + ROPE, D, seed=6), norm_weight(R, 7)
KV_B = noise(H * (NOPE + V), R, seed=8)
OUT = noise(D, H * V, seed=9)
LATENT = (KV_A, KV_A_NORM, KV_B)


def wide(tensor):
    return tensor.double().numpy()


def query_rows(rows, head):
    """The rows of one head's query that are not rotated."""
    start = head * (NOPE + ROPE)
    return wide(rows)[start : start + NOPE]


def folded(head, kind):
    """Key or value of one head as a matrix on the block's input: W_up diag(norm) W_down."""
    start = head * (NOPE + V) + (NOPE if kind == "value" else 0)
    rows = wide(KV_B)[start : start + (V if kind == "value" else NOPE)]
    return rows @ np.diag(wide(KV_A_NORM)) @ wide(KV_A)[:R]


def folded_low_rank(head):
    return query_rows(Q_B, head) @ np.diag(wide(Q_A_NORM)) @ wide(Q_A)


def expected_rms(matrix):
    """Root mean square of matrix @ x for uncorrelated x whose channels are as large as the norm."""
    return math.sqrt(np.trace(matrix @ np.diag(wide(INPUT_NORM) ** 2) @ matrix.T) / len(matrix))


def over_heads(matrix_of):
    return np.concatenate([matrix_of(head) for head in range(H)])


def test_query_is_the_rows_that_are_not_rotated():
    made = make(Op.TAKE_QUERY, Q, shape=(H * NOPE, D))
    assert torch.equal(made, torch.cat([Q[h * 24 : h * 24 + 16] for h in range(H)]))


def test_low_rank_query_is_multiplied_out():
    made = make(Op.FOLD_QUERY, Q_A, Q_A_NORM, Q_B, shape=(H * NOPE, D), q_lora_rank=QR)
    assert close(made, over_heads(folded_low_rank))


@pytest.mark.parametrize("in_features", [D, QR], ids=["q", "q_b"])
def test_kept_query_loses_its_rotated_rows_and_nothing_else_without_yarn(in_features):
    query = noise(H * (NOPE + ROPE), in_features)
    made = make(Op.KEEP_QUERY, query, shape=tuple(query.shape))
    heads = made.view(H, NOPE + ROPE, in_features)
    assert torch.equal(heads[:, :NOPE], query.view(H, NOPE + ROPE, in_features)[:, :NOPE])
    assert not heads[:, NOPE:].any()


def test_kept_query_takes_over_yarns_factor_on_the_softmax_scale():
    made = make(Op.KEEP_QUERY, Q, shape=tuple(Q.shape), rope_scaling=YARN)
    factor = (0.1 * 0.707 * math.log(40.0) + 1) ** 2
    expected = wide(Q).reshape(H, NOPE + ROPE, D) * factor
    expected[:, NOPE:] = 0
    assert close(made, expected.reshape(Q.shape))


def test_kept_query_leaves_its_source_as_it_was():
    query = Q.clone()
    make(Op.KEEP_QUERY, query, shape=tuple(Q.shape))
    assert torch.equal(query, Q)


@pytest.mark.parametrize(
    ("op", "kind"), [(Op.FOLD_KEY, "key"), (Op.FOLD_VALUE, "value")], ids=["key", "value"]
)
def test_latent_is_multiplied_out(op, kind):
    made = make(op, *LATENT, shape=(H * V, D))
    assert close(made, over_heads(lambda head: folded(head, kind)))


def test_folded_key_points_where_the_teachers_key_does():
    made = make(Op.FOLD_KEY, *LATENT, shape=(H * NOPE, D)).double()
    x = noise(D, seed=20).double()
    latent = KV_A[:R].double() @ x
    latent = latent / latent.square().mean().sqrt() * KV_A_NORM
    teacher = (KV_B.double() @ latent).view(H, NOPE + V)[:, :NOPE]
    ours = (made @ x).view(H, NOPE)
    cosine = torch.nn.functional.cosine_similarity(ours, teacher, dim=-1)
    assert cosine.min() >= 1 - BOUND


TAPS = {
    "query": (Op.QUERY_TAPS, (INPUT_NORM, Q), lambda head: query_rows(Q, head), 5.0, {}),
    "low-rank-query": (
        Op.FOLDED_QUERY_TAPS,
        (INPUT_NORM, Q_A, Q_A_NORM, Q_B),
        folded_low_rank,
        5.0,
        {"q_lora_rank": QR},
    ),
    "key": (Op.KEY_TAPS, (INPUT_NORM, *LATENT), lambda head: folded(head, "key"), 5.0, {}),
    "value": (Op.VALUE_TAPS, (INPUT_NORM, *LATENT), lambda head: folded(head, "value"), 0.7, {}),
}


@pytest.mark.parametrize("kind", TAPS)
def test_last_tap_brings_every_head_to_the_recipes_rms(kind):
    op, sources, matrix_of, rms, fields = TAPS[kind]
    made = make(op, *sources, shape=(H * 16, 1, 3), **fields)
    assert not made[:, :, :-1].any()
    gains = [rms / expected_rms(matrix_of(head)) for head in range(H)]
    assert len(set(gains)) == H
    assert close(made[:, 0, -1], np.repeat(gains, 16))


@pytest.mark.parametrize("kind", TAPS)
def test_measured_rms_before_silu_is_the_recipes(kind):
    op, sources, matrix_of, rms, fields = TAPS[kind]
    taps = make(op, *sources, shape=(H * 16, 1, 3), **fields)[:, 0, -1].double()
    x = INPUT_NORM.double() * noise(20_000, D, seed=21).double()
    for head in range(H):
        features = x @ torch.from_numpy(matrix_of(head)).T * taps[head * 16]
        # 20,000 draws of at least 12 directions: the rms is known to about half a percent.
        assert abs(features.square().mean().sqrt() / rms - 1) < 0.03


@pytest.mark.parametrize(
    ("kind", "source"), [("query", 1), ("low-rank-query", 3), ("key", 3), ("value", 3)]
)
def test_head_without_power_passes_its_input_on(kind, source):
    op, sources, matrix_of, rms, fields = TAPS[kind]
    pruned = [tensor.clone() for tensor in sources]
    pruned[source].view(H, -1, pruned[source].shape[-1])[2] = 0
    taps = make(op, *pruned, shape=(H * 16, 1, 3), **fields)[:, 0, -1].view(H, 16)
    assert torch.equal(taps[2], torch.ones(16))
    assert close(taps[3, 0], rms / expected_rms(matrix_of(3)))


@pytest.mark.parametrize("kind", TAPS)
def test_layer_of_zeros_gives_finite_taps(kind):
    op, sources, _, _, fields = TAPS[kind]
    zeros = [torch.zeros_like(tensor) for tensor in sources]
    taps = make(op, *zeros, shape=(H * 16, 1, 3), **fields)
    assert torch.equal(taps[:, 0, -1], torch.ones(H * 16))


@pytest.mark.parametrize("kind", TAPS)
def test_tiny_weights_give_finite_taps(kind):
    op, sources, _, _, fields = TAPS[kind]
    tiny = [tensor * 1e-12 for tensor in sources]  # products underflow fp32
    make(op, *tiny, shape=(H * 16, 1, 3), **fields)


def test_output_columns_have_the_size_of_the_teachers_values():
    made = make(Op.SCALE_OUTPUT, OUT, INPUT_NORM, *LATENT, shape=(D, H * V))
    latent = wide(KV_A)[:R] * wide(INPUT_NORM)
    latent_power = (latent**2).sum(1).mean()
    rms = [expected_rms(folded(head, "value")) / math.sqrt(latent_power) for head in range(H)]
    assert close(made, wide(OUT) * np.repeat(rms, V))


def test_rms_of_the_teachers_values_is_the_one_measured():
    made = make(Op.SCALE_OUTPUT, OUT, INPUT_NORM, *LATENT, shape=(D, H * V))
    latents = (INPUT_NORM * noise(20_000, D, seed=22)) @ KV_A[:R].T
    latents = latents / latents.square().mean(-1, keepdim=True).sqrt() * KV_A_NORM
    values = (latents @ KV_B.T).view(-1, H, NOPE + V)[..., NOPE:]
    measured = values.square().mean((0, 2)).sqrt()
    scales = (made / OUT).view(D, H, V)[0, :, 0]
    # The estimate takes 1/rms(latent) as independent of the rest; it holds to some percent.
    assert ((scales / measured - 1).abs() < 0.15).all()


@pytest.mark.parametrize("zeroed", [1, 2, 3, 4], ids=["input-norm", "kv_a", "norm", "kv_b"])
def test_values_without_power_give_no_output(zeroed):
    sources = [OUT, INPUT_NORM, *LATENT]
    sources[zeroed] = torch.zeros_like(sources[zeroed])
    assert not make(Op.SCALE_OUTPUT, *sources, shape=(D, H * V)).any()


def test_output_norm_makes_up_for_the_gate_at_its_middle():
    assert torch.equal(make(Op.OUTPUT_GAIN, shape=(V,)), torch.full((V,), 0.6))


@pytest.mark.parametrize(
    "half_lives", [(0.5, 300.0), (0.3, 10.0), (4.0, 4.0), (0.01, 1e7)], ids=str
)
def test_channels_have_the_half_lives_of_the_recipe(half_lives):
    recipe = Recipe(half_life_tokens=half_lives)
    a_log = make(Op.DECAY_RATE, shape=(1, 1, H, 1), recipe=recipe)
    bias = make(Op.DECAY_BIAS, shape=(H * NOPE,), recipe=recipe)
    stored = a_log.float().double().view(H, 1), bias.float().double().view(H, NOPE)
    softplus = np.logaddexp(0, stored[1].numpy())
    decay = np.exp(-np.exp(stored[0].numpy()) * softplus)
    expected = np.geomspace(*half_lives, NOPE)
    found = math.log(0.5) / np.log(decay)
    # A_log and dt_bias reach 17 and round to fp32, and a rate takes a factor e to their error;
    # exp(-rate) of a long half-life then loses its digits to 1 - rate: 1e-16 / 1e-7.
    assert np.abs(found / expected - 1).max() < 5e-6


def test_every_head_decays_alike():
    bias = make(Op.DECAY_BIAS, shape=(H * NOPE,)).view(H, NOPE)
    assert torch.equal(bias, bias[:1].expand(H, NOPE))
    assert make(Op.DECAY_RATE, shape=(1, 1, H, 1)).unique().numel() == 1


def test_zeros_open_every_gate_half():
    assert not make(Op.ZEROS, shape=(H * V, V)).any()


def test_random_weights_have_the_models_own_deviation():
    made = make(Op.RANDOM, shape=(64, 512), initializer_range=0.05)
    # 32,768 draws: the deviation is known to 0.4 %, the mean to 0.0003.
    assert abs(made.std().item() / 0.05 - 1) < 0.02
    assert abs(made.mean().item()) < 0.0015


def test_random_weights_depend_on_name_and_seed_alone():
    first = make(Op.RANDOM, shape=(V, D), target="layers.0.kda.f_a.weight")
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(make(Op.RANDOM, shape=(V, D), target="layers.0.kda.f_a.weight"), first)
    others = [
        make(Op.RANDOM, shape=(V, D), target="layers.0.kda.g_a.weight"),
        make(Op.RANDOM, shape=(V, D), target="layers.1.kda.f_a.weight"),
        make(Op.RANDOM, shape=(V, D), target="layers.0.kda.f_a.weight", recipe=Recipe(seed=1)),
    ]
    assert not any(torch.equal(one, first) for one in others)


def test_random_weights_leave_the_programs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make(Op.RANDOM, shape=(V, D))
    assert torch.equal(torch.rand(3), expected)


def test_every_operation_that_computes_has_a_function():
    assert set(TRANSFORMS) == set(Op) - {Op.COPY, Op.QUANTIZE, Op.DEQUANTIZE, Op.FITTED}
