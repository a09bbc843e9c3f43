"""Sets of kept layers at longer contexts, against models run as wholes."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.conversion.calibration import long_context
from kimi_convert.conversion.calibration.long_context import compare_at_length
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.calibration.study import Study
from kimi_convert.model.loading import load_model, open_layers
from tests.tiny import tiny_config, write_tiny_checkpoint

SHORT, SETS = 16, ((3,), (0,))


class Same:
    """A student that mixes as the teacher's layer does."""

    def __init__(self, layer):
        self.features = layer.mla


class Nothing:
    """A student that mixes nothing."""

    features = staticmethod(torch.zeros_like)


@pytest.fixture
def teacher(tmp_path):
    return write_tiny_checkpoint(tmp_path / "teacher", tiny_config("deepseek_v3"))


@pytest.fixture
def compare(teacher, tmp_path, monkeypatch):
    """Compare the sets where kept layers are the teacher's and the others mix nothing."""
    eye = torch.eye(32)

    def planted(kind, layer, *_):
        return (Same(layer) if kind == "mla" else Nothing()), eye

    monkeypatch.setattr(long_context, "future", planted)
    text = torch.randint(96, (8, SHORT + 1), generator=torch.Generator().manual_seed(1))
    text[1:, 0] = text[:-1, -1]  # rows follow each other
    inputs, targets = text[:, :-1], text[:, 1:]

    @torch.no_grad()
    def run():
        log_probs = load_model(teacher)(inputs).log_softmax(-1).half()
        study = Study(kl_as_kda={}, kl_as_mla={}, log_probs=log_probs, tokens=inputs)
        store = CalibrationStore(tmp_path / "work", "digest")
        with open_layers(teacher) as layers:
            return compare_at_length(layers, None, study, SETS, targets, store, lambda event: None)

    return inputs, targets, run


@torch.no_grad()
def last_half(folder, tokens, kept):
    """Log probabilities of a model whose other layers mix nothing."""
    model = load_model(folder)
    hidden = model.embed(tokens)
    for layer_idx, layer in enumerate(model.layers):
        hidden = layer(hidden) if layer_idx in kept else hidden + layer.feed_forward(hidden)
    return model.head(hidden).log_softmax(-1)[:, tokens.shape[1] // 2 :]


def test_longest_context_that_the_teacher_handles_counts(teacher, compare, monkeypatch):
    monkeypatch.setattr(long_context, "_SLACK", 100.0)  # a random teacher handles any
    inputs, _, run = compare
    found = run()
    assert found.length == 4 * SHORT
    tokens = inputs.flatten().view(2, 4 * SHORT)
    expected = last_half(teacher, tokens, range(4))
    for kept in SETS:
        student = last_half(teacher, tokens, kept)
        kl = (expected.exp() * (expected - student)).sum(-1).mean().item()
        assert found.kl_of[kept] == pytest.approx(kl, rel=1e-4)


def test_length_that_makes_the_same_tokens_harder_does_not_count(compare, monkeypatch):
    *_, run = compare
    monkeypatch.setattr(long_context, "_SLACK", -100.0)
    assert run() is None


def test_tokens_are_held_against_themselves_with_less_context(teacher, compare, monkeypatch):
    inputs, targets, run = compare
    losses = []
    real = long_context._short_loss
    monkeypatch.setattr(
        long_context, "_short_loss", lambda *given: losses.append(real(*given)) or 100.0
    )
    run()
    log_probs = load_model(teacher)(inputs).log_softmax(-1)
    each = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    # Of sequences of two rows the second is the last half, of four the last two; log probabilities
    # near 4.6 are kept in fp16.
    assert losses == [
        pytest.approx(each[1::2].mean().item(), abs=2e-3),
        pytest.approx(each[[2, 3, 6, 7]].mean().item(), abs=2e-3),
    ]
