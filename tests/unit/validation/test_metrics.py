"""Metrics against their formulas in fp64, and at the values where they must be exact."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.validation.metrics import (
    MaxRelativeError,
    RelativeSquaredError,
    forward_kl,
    perplexity,
    token_loss,
    token_slices,
    top1_agreement,
)

# fp32 rounds each of a few operations on values up to 20 by at most 6e-8 of them, and log-softmax
# sums 50 exponentials: 50 * 6e-8 * 20 is far above what adds up.
FP32 = 6e-5


def random_logits(seed, *, rows=7, vocab=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(rows, vocab, generator=generator, dtype=dtype)


def probabilities(logits):
    """Return softmax rows by the textbook formula, as lists of floats."""
    rows = []
    for row in logits.tolist():
        sizes = [math.exp(value - max(row)) for value in row]
        rows.append([size / math.fsum(sizes) for size in sizes])
    return rows


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        pytest.param(torch.float64, 1e-12, id="fp64"),
        pytest.param(torch.float32, FP32, id="fp32"),
    ],
)
def test_loss_and_divergence_follow_their_formulas(dtype, bound):
    teacher, student = random_logits(1), random_logits(2)
    targets = torch.arange(7) * 6
    p, q = probabilities(teacher), probabilities(student)
    expected_kl = [
        math.fsum(a * math.log(a / b) for a, b in zip(ps, qs, strict=True))
        for ps, qs in zip(p, q, strict=True)
    ]
    expected_loss = [-math.log(q[n][target]) for n, target in enumerate(targets.tolist())]
    teacher, student = (x.to(dtype).log_softmax(-1) for x in (teacher, student))
    assert forward_kl(teacher, student).tolist() == pytest.approx(expected_kl, abs=bound)
    assert token_loss(student, targets).tolist() == pytest.approx(expected_loss, abs=bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_model_does_not_diverge_from_itself(dtype):
    log_probs = random_logits(3, dtype=dtype).log_softmax(-1)
    assert forward_kl(log_probs, log_probs).tolist() == [0.0] * 7
    assert top1_agreement(log_probs, log_probs).all()


def test_divergence_is_forward():
    sure = torch.tensor([[0.0, -40.0]]).log_softmax(-1)
    unsure = torch.zeros(1, 2).log_softmax(-1)
    assert forward_kl(sure, unsure).item() == pytest.approx(math.log(2), abs=FP32)
    assert forward_kl(unsure, sure).item() == pytest.approx(20 - math.log(2), abs=FP32)


def test_divergence_is_finite_where_a_probability_underflows():
    rare = torch.tensor([[0.0, -200.0]]).log_softmax(-1)
    other = torch.tensor([[-200.0, 0.0]]).log_softmax(-1)
    assert forward_kl(rare, other).item() == pytest.approx(200, rel=1e-6)


def test_agreement_compares_the_largest_entries():
    teacher = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    student = torch.tensor([[0.0, 0.1, -9.0], [3.0, 2.9, 2.8]])
    assert top1_agreement(teacher, student).tolist() == [True, False]


def test_perplexity_of_the_uniform_guess_is_the_vocabulary():
    assert perplexity(math.log(4096)) == pytest.approx(4096)
    assert perplexity(1e4) == math.inf


@given(
    num_tokens=st.integers(0, 300),
    vocab_size=st.integers(1, 5000),
    max_bytes=st.integers(1, 100_000),
)
def test_slices_cover_every_token_once_within_the_limit(num_tokens, vocab_size, max_bytes):
    slices = list(token_slices(num_tokens, vocab_size=vocab_size, max_bytes=max_bytes))
    covered = [n for part in slices for n in range(part.start, part.stop)]
    assert covered == list(range(num_tokens))
    for part in slices:
        length = part.stop - part.start
        assert length == 1 or 4 * vocab_size * length <= max_bytes


def test_relative_squared_error_is_that_of_everything_added():
    generator = torch.Generator().manual_seed(4)
    found, expected = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    error = RelativeSquaredError()
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        error.add(found[part], expected[part])
    whole = ((found - expected) ** 2).sum() / (expected**2).sum()
    assert error.value == pytest.approx(whole.item(), rel=1e-14)


def test_relative_squared_error_is_1_for_silence_and_0_for_equality():
    expected = torch.randn(5, 5)
    silence, equality = RelativeSquaredError(), RelativeSquaredError()
    silence.add(torch.zeros(5, 5), expected)
    equality.add(expected.clone(), expected)
    assert (silence.value, equality.value) == (1.0, 0.0)


@pytest.mark.parametrize("kind", [RelativeSquaredError, MaxRelativeError])
def test_errors_relative_to_nothing(kind):
    nothing, something = kind(), kind()
    nothing.add(torch.zeros(3), torch.zeros(3))
    something.add(torch.ones(3), torch.zeros(3))
    assert (nothing.value, something.value) == (0.0, math.inf)


def test_squares_of_fp16_do_not_overflow():
    error = RelativeSquaredError()
    error.add(torch.full((4,), 600.0).half(), torch.full((4,), 300.0).half())
    assert error.value == 1.0


def test_largest_error_is_over_the_largest_value_of_all_parts():
    error = MaxRelativeError()
    error.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    error.add(torch.tensor([-8.0]), torch.tensor([-8.0]))
    assert error.value == 0.5 / 8.0


@pytest.mark.parametrize("at", [0, 1], ids=["first-part", "last-part"])
@pytest.mark.parametrize("side", [0, 1], ids=["found", "expected"])
def test_largest_error_keeps_a_nan(at, side):
    error = MaxRelativeError()
    for part in range(2):
        values = [torch.ones(3), torch.ones(3)]
        if part == at:
            values[side][1] = math.nan
        error.add(*values)
    assert math.isnan(error.value)
