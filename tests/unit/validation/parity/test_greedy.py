from __future__ import annotations

import torch

from kimi_convert.validation.parity.greedy import compare_greedy
from kimi_convert.validation.parity.trace import Greedy


def continuation(*rows):
    logits = torch.tensor(rows)
    return Greedy(logits.argmax(-1), logits)


def test_equal_continuations_pass():
    one = continuation([1.0, 2.0], [2.0, 1.0])
    found = compare_greedy(one, one, bound=1e-5)
    assert (found.passed, found.equal, found.tokens) == (True, 2, 2)


def test_parting_at_a_near_tie_passes():
    one, other = continuation([1.0, 2.0], [2.0, 2.00001]), continuation([1.0, 2.0], [3.0, 1.0])
    found = compare_greedy(other, one, bound=1e-5)
    assert (found.passed, found.equal) == (True, 1)
    assert 0 < found.gap <= found.margin


def test_parting_elsewhere_fails():
    one, other = continuation([1.0, 2.0]), continuation([2.0, 1.0])
    assert not compare_greedy(other, one, bound=1e-5).passed
