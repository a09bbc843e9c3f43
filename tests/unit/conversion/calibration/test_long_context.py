"""Sets of kept layers at longer contexts, against models run as wholes."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.conversion.calibration import long_context
from kimi_convert.conversion.calibration.long_context import compare_at_length
from kimi_convert.conversion.calibration.store import CalibrationStore
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

    def run():
        store = CalibrationStore(tmp_path / "work", "digest")
        with open_layers(teacher) as layers:
            return compare_at_length(layers, None, SETS, text, store, lambda event: None)

    return text, run


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
    text, run = compare
    found = run()
    assert found.length == 4 * SHORT
    tokens = text[:, :-1].flatten().view(2, 4 * SHORT)
    expected = last_half(teacher, tokens, range(4))
    for kept in SETS:
        student = last_half(teacher, tokens, kept)
        kl = (expected.exp() * (expected - student)).sum(-1).mean().item()
        assert found.kl_of[kept] == pytest.approx(kl, rel=1e-4)


def test_length_that_makes_the_same_tokens_harder_does_not_count(compare, monkeypatch):
    _, run = compare
    monkeypatch.setattr(long_context, "_SLACK", -100.0)
    assert run() is None


@torch.no_grad()
def test_tokens_are_held_against_themselves_with_less_context(teacher, compare, monkeypatch):
    text, run = compare
    model = load_model(teacher)
    tokens, targets = text[:, :-1].flatten(), text[:, 1:].flatten()

    def loss(length):
        """Of the teacher on the last 16 of each 32 tokens."""
        log_probs = model(tokens.view(-1, length)).log_softmax(-1).flatten(0, 1)
        each = -log_probs.gather(-1, targets[:, None])
        return each.view(-1, 2 * SHORT)[:, SHORT:].mean().item()

    harder = loss(2 * SHORT) - loss(SHORT)
    monkeypatch.setattr(long_context, "_SLACK", harder - 1e-4)
    assert run() is None
    monkeypatch.setattr(long_context, "_SLACK", harder + 1e-4)
    assert run().length >= 2 * SHORT
