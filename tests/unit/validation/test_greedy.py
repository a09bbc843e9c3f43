"""Where two continuations part, and that they are the models' own."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.model.generation import generate
from kimi_convert.model.loading import load_model
from kimi_convert.validation.greedy import agreement, measure_greedy
from kimi_convert.validation.options import ValidationOptions
from kimi_convert.validation.report import Parting
from tests.tiny import write_tiny_checkpoint
from tests.unit.validation.build import TEACHER, silent, write_hybrid


def test_only_the_first_difference_counts():
    written = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 9], [8, 2, 3, 4]])
    expected = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    gaps = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.05, 0.0, 7.0], [0.5, 0.0, 0.0, 0.0]])
    found = agreement(written, expected, gaps, 5)
    assert found.agreed == (4 + 1 + 0) / 12
    assert found.partings[0] is None
    assert found.partings[1] == Parting(after=1, gap=pytest.approx(0.05))
    assert found.partings[2] == Parting(after=0, gap=0.5)
    assert (found.whole, found.near_ties) == (1, 1)


@torch.inference_mode()
def test_continuations_and_gaps_are_the_models_own(tmp_path):
    student = write_hybrid(tmp_path / "student", seed=1)
    teacher = write_tiny_checkpoint(tmp_path / "teacher", TEACHER, seed=2)
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(3))
    found = measure_greedy(
        student,
        tokens,
        teacher=teacher,
        options=ValidationOptions(greedy_tokens=12),
        on_progress=silent,
    )
    for row, parting in zip(tokens.tolist(), found.partings, strict=True):
        ours, theirs = (
            list(generate(load_model(folder), row, max_new_tokens=found.new_tokens))
            for folder in (student, teacher)
        )
        after = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        assert parting.after == after
        logits = load_model(teacher)(torch.tensor([row + theirs[:after]]))[0, -1]
        gap = (logits[theirs[after]] - logits[ours[after]]).item()
        assert parting.gap == pytest.approx(gap, abs=1e-4)


def test_model_writes_the_same_as_itself(tmp_path):
    student = write_hybrid(tmp_path, seed=1)
    tokens = torch.randint(300, (3, 8), generator=torch.Generator().manual_seed(3))
    found = measure_greedy(
        student,
        tokens,
        teacher=student,
        options=ValidationOptions(greedy_tokens=12),
        on_progress=silent,
    )
    assert (found.agreed, found.whole, found.partings) == (1.0, 3, (None, None, None))
