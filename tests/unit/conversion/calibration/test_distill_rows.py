"""Which rows each step of a distillation draws."""

from __future__ import annotations

import torch

from kimi_convert.conversion.calibration.distill_rows import StepRows

LENGTH, ROWS = 64, 33
TOKENS = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)


def rows_of(steps, *, seed=0, rows_per_step=8):
    rows = StepRows(TOKENS, rows_per_step=rows_per_step, seed=seed)
    return torch.cat([rows.of(step) for step in steps])


def plain(rows):
    """The rows that are a piece of the text."""
    return rows[(rows.diff(dim=1) == 1).all(1)]


def test_a_pass_takes_every_piece_once_and_the_next_cuts_elsewhere():
    first, second = plain(rows_of(range(4))), plain(rows_of(range(4, 8)))
    for rows in (first, second):
        assert len(rows) > 16
        assert len(rows.unique()) == rows.numel()  # no token twice
        assert len({*(rows[:, 0] % LENGTH).tolist()}) == 1  # one cut
    assert first[0, 0] % LENGTH != second[0, 0] % LENGTH


def test_some_rows_repeat_a_piece_of_themselves():
    rows = rows_of(range(200))
    share = 1 - len(plain(rows)) / len(rows)
    assert 0.08 < share < 0.17
    for row in rows:
        if not (row.diff() == 1).all():
            span = int((row[1:] == row[0]).nonzero()[0]) + 1
            assert 8 <= span <= LENGTH // 2
            assert torch.equal(row[span:], row[:-span])


def test_rows_depend_on_step_and_seed_alone():
    assert torch.equal(rows_of([7]), rows_of([3, 7])[8:])
    assert not torch.equal(rows_of([7], seed=1), rows_of([7]))


def test_more_rows_than_there_are_pieces_are_not_drawn():
    assert rows_of([0, 5], rows_per_step=500).shape == (2 * (ROWS - 1), LENGTH)
