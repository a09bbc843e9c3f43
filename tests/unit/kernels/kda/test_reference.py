"""The reference is the report's equation: everything else is measured against it."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.kernels.kda.reference import chunk_kda_reference, recurrent_kda_reference
from tests.unit.kernels.kda.cases import make_inputs, make_state


def test_recurrence_of_one_number_is_worked_out_by_hand():
    column = [torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([2, 1], [1, 0.5])]
    q, k = column
    v = torch.tensor([3.0, 5.0], dtype=torch.float64).view(1, 2, 1, 1)
    g = torch.tensor([0.5, 0.25], dtype=torch.float64).log().view(1, 2, 1, 1)
    beta = torch.tensor([0.5, 0.8], dtype=torch.float64).view(1, 2, 1)
    state = torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64)
    # t=1: S = 4 * 0.5 = 2; u = 0.5 (3 - 2) = 0.5; S = 2.5; o = 10 * 2.5 * 2 = 50
    # t=2: S = 2.5 * 0.25 = 0.625; u = 0.8 (5 - 0.3125) = 3.75; S = 2.5; o = 10 * 2.5 * 1 = 25
    output, last = recurrent_kda_reference(q, k, v, g, beta, scale=10.0, state=state)
    torch.testing.assert_close(output.flatten(), torch.tensor([50.0, 25.0]).double())
    torch.testing.assert_close(last.flatten(), torch.tensor([2.5]).double())


def test_recurrence_is_equation_1_with_its_transition_matrix_written_out():
    inputs = make_inputs("mixed", 7).to(torch.float64)
    start = make_state(inputs).double()
    output, last = recurrent_kda_reference(*inputs, scale=0.3, state=start)
    eye = torch.eye(inputs.q.shape[-1], dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            state = start[b, h]
            for t in range(7):
                q, k, v, g, beta = (x[b, t, h] for x in inputs)
                state = (eye - beta * torch.outer(k, k)) @ torch.diag(g.exp()) @ state
                state = state + beta * torch.outer(k, v)
                torch.testing.assert_close(output[b, t, h], 0.3 * state.T @ q)
            torch.testing.assert_close(last[b, h], state)


@pytest.mark.parametrize("kind", ["zero", "weak", "minus-5"])
def test_chunk_formula_is_the_recurrence(kind):
    inputs = make_inputs(kind, 20).to(torch.float64)
    state = make_state(inputs).double()
    expected = recurrent_kda_reference(*inputs, scale=0.25, state=state)
    found = chunk_kda_reference(*inputs, scale=0.25, state=state)
    torch.testing.assert_close(found, expected)
