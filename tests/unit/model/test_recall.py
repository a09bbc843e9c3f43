"""Probes against models that can and cannot look things up."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.model.recall import (
    copying_probe,
    induction_probe,
    pairs_probe,
)

IDS = torch.arange(10, 90)
PROBES = {
    "copying": lambda seed=0: copying_probe(IDS, span=16, rows=12, seed=seed),
    "induction": lambda seed=0: induction_probe(IDS, length=40, rows=64, seed=seed),
    "pairs": lambda seed=0: pairs_probe(IDS, pairs=10, rows=12, seed=seed),
}
ANSWERS = {"copying": 12 * 15, "induction": 64, "pairs": 12 * 10}


def looks_up(tokens):
    """Predict what followed the last earlier occurrence of the current token."""
    logits = torch.zeros(*tokens.shape, 100)
    for row, sequence in enumerate(tokens.tolist()):
        followed = {}
        for at, token in enumerate(sequence):
            if token in followed:
                logits[row, at, followed[token]] = 1.0
            if at + 1 < len(sequence):
                followed[token] = sequence[at + 1]
    return logits


def repeats(tokens):
    return torch.nn.functional.one_hot(tokens, 100).float()


def share_of(model, probe):
    """Return how many answers a model gives."""
    found = model(probe.inputs).argmax(-1)[probe.asked]
    return (found == probe.answers).double().mean().item()


@pytest.mark.parametrize("name", PROBES)
def test_model_that_looks_up_answers_all(name):
    probe = PROBES[name]()
    assert share_of(looks_up, probe) == 1.0
    assert len(probe.answers) == ANSWERS[name]


@pytest.mark.parametrize("name", PROBES)
def test_model_that_repeats_itself_answers_nothing(name):
    assert share_of(repeats, PROBES[name]()) == 0.0


@pytest.mark.parametrize("name", PROBES)
def test_model_without_context_guesses(name):
    generator = torch.Generator().manual_seed(3)

    def guess(tokens):
        return torch.rand(*tokens.shape, 100, generator=generator)

    assert share_of(guess, PROBES[name]()) < 0.1


@pytest.mark.parametrize("name", PROBES)
def test_draws_belong_to_the_seed(name):
    assert torch.equal(PROBES[name]().tokens, PROBES[name]().tokens)
    assert not torch.equal(PROBES[name]().tokens, PROBES[name](seed=1).tokens)
    assert set(PROBES[name]().tokens.unique().tolist()) <= set(IDS.tolist())
