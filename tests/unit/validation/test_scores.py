"""Scores of tokens against whole logits in fp64, their means, and the memory they take."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_convert.validation import scores
from kimi_convert.validation.scores import Stream, TokenScores, score_tokens, summarise
from tests.unit.model.build import LargestTensor

ROWS, LENGTH, WIDTH, VOCAB = 3, 11, 6, 40
# Logits of a few units and sums over 40 entries in fp32: some hundred roundings of 6e-8.
FP32 = 1e-5


def random_stream(seed, dtype=torch.float32, vocab=VOCAB, rows=ROWS, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, WIDTH, generator=generator)
    hidden = torch.randn(rows, length, WIDTH, generator=generator).to(dtype)
    return Stream(hidden, lambda x: (x @ weight.to(x.dtype).T).float())


def random_targets(vocab=VOCAB, rows=ROWS, length=LENGTH):
    generator = torch.Generator().manual_seed(9)
    return torch.randint(vocab, (rows, length), generator=generator)


def whole(stream):
    return stream.head(stream.hidden).double().log_softmax(-1)


@pytest.mark.parametrize("tokens_per_run", [1, 4, 33, 1000])
def test_scores_are_those_of_whole_logits(tokens_per_run, monkeypatch):
    monkeypatch.setattr(scores, "_LOGITS_BYTES", 4 * VOCAB * tokens_per_run)
    teacher, student, other = random_stream(1), random_stream(2), random_stream(3)
    targets = random_targets()
    scored, of_teacher = score_tokens(
        targets, students=[student, other], teacher=teacher, vocab_size=VOCAB
    )
    p = whole(teacher)
    for one, stream in zip(scored, (student, other), strict=True):
        q = whole(stream)
        torch.testing.assert_close(one.kl, (p.exp() * (p - q)).sum(-1), rtol=0, atol=FP32)
        expected = -q.gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(one.loss, expected, rtol=0, atol=FP32)
        assert torch.equal(one.agrees, p.argmax(-1) == q.argmax(-1))
    expected = -p.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(of_teacher.loss, expected, rtol=0, atol=FP32)
    assert of_teacher.kl is None


def test_model_against_itself_scores_0_and_1():
    stream = random_stream(1)
    (scored,), _ = score_tokens(
        random_targets(), students=[stream], teacher=stream, vocab_size=VOCAB
    )
    assert torch.equal(scored.kl, torch.zeros(ROWS, LENGTH, dtype=torch.float64))
    assert scored.agrees.all()


def test_without_a_teacher_there_are_losses_alone():
    (scored,), of_teacher = score_tokens(
        random_targets(), students=[random_stream(1)], teacher=None, vocab_size=VOCAB
    )
    assert of_teacher is None
    assert (scored.kl, scored.agrees) == (None, None)
    assert summarise(scored, ["a"] * ROWS).overall.kl is None


def test_logits_of_all_tokens_never_exist():
    vocab, rows, length = 20_000, 4, 250
    streams = [random_stream(n, vocab=vocab, rows=rows, length=length) for n in range(3)]
    with LargestTensor() as largest:
        score_tokens(
            random_targets(vocab, rows, length),
            students=streams[:2],
            teacher=streams[2],
            vocab_size=vocab,
        )
    limit_bytes = 32 * 1024 * 1024
    assert 4 * rows * length * vocab > 2 * limit_bytes
    assert limit_bytes // 2 < largest.nbytes <= limit_bytes


def test_means_are_over_rows_of_a_kind_and_ranges_of_positions():
    loss = torch.arange(3.0 * 300, dtype=torch.float64).reshape(3, 300) / 100
    agrees = torch.zeros(3, 300, dtype=torch.bool)
    agrees[1] = True
    summary = summarise(TokenScores(loss, 2 * loss, agrees), ["a", "b", "a"])
    assert summary.overall.tokens == 900
    assert summary.overall.top1_agreement == pytest.approx(1 / 3)
    assert list(summary.by_kind) == ["a", "b"]
    assert summary.by_kind["a"].tokens == 600
    assert summary.by_kind["a"].loss == pytest.approx(loss[[0, 2]].mean().item())
    assert summary.by_kind["b"].top1_agreement == 1.0
    assert summary.by_kind["b"].kl == pytest.approx(2 * loss[1].mean().item())
    ranges = [(one.start, one.stop, one.scores.tokens) for one in summary.by_position]
    assert ranges == [(0, 64, 192), (64, 256, 576), (256, 300, 132)]
    assert summary.by_position[2].scores.loss == pytest.approx(loss[:, 256:].mean().item())
    assert summary.overall.perplexity == pytest.approx(math.exp(loss.mean().item()))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [(0, 1)]),
        (64, [(0, 64)]),
        (65, [(0, 64), (64, 65)]),
        (5000, [(0, 64), (64, 256), (256, 1024), (1024, 4096), (4096, 5000)]),
    ],
)
def test_ranges_cover_every_position_once(length, expected):
    summary = summarise(TokenScores(torch.ones(1, length, dtype=torch.float64)), ["a"])
    assert [(one.start, one.stop) for one in summary.by_position] == expected
