"""What only the chunked form has: chunk sizes, segments, bounded memory, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_convert.kernels.kda import chunk, chunk_kda, recurrent_kda
from tests.unit.kernels.kda.cases import (
    GATES,
    assert_within_twice_plain,
    make_inputs,
    make_state,
    oracle,
    plain,
)


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 64])
@pytest.mark.parametrize("T", [1, 17, 64, 100])
def test_every_chunk_size_gives_the_recurrence(chunk_size, T):
    inputs = make_inputs("mixed", T)
    state = make_state(inputs)
    found = chunk_kda(*inputs, initial_state=state, chunk_size=chunk_size)
    assert_within_twice_plain(found, plain(inputs, state=state), oracle(inputs, state=state))


@pytest.mark.parametrize("kind", ["zero", "weak", "mixed"])
@pytest.mark.parametrize("K", [16, 64])
def test_error_stays_bounded_for_keys_that_are_alike_and_written_in_full(kind, K):
    inputs = make_inputs(kind, 500, K=K, V=K, similar=2.0)
    assert_within_twice_plain(chunk_kda(*inputs), plain(inputs), oracle(inputs))


def test_weak_gates_keep_their_digits_beside_strong_ones():
    # A cumulative sum near -600 rounds to 3e-5, and so would differences of such sums.
    inputs = make_inputs("weak", 64, similar=1.0)
    g = torch.where(torch.arange(64).view(1, -1, 1, 1) < 32, -20.0, -0.01).expand_as(inputs.g)
    inputs = inputs._replace(g=g)
    assert_within_twice_plain(chunk_kda(*inputs, chunk_size=64), plain(inputs), oracle(inputs))


@given(
    length=st.integers(1, 500),
    chunk_size=st.sampled_from([1, 2, 8, 32, 64]),
    max_tokens=st.integers(0, 300),
)
def test_segments_cover_every_token_once_in_whole_chunks_and_one_tail(
    length, chunk_size, max_tokens
):
    segments = list(chunk._segments(length, chunk_size=chunk_size, max_tokens=max_tokens))
    assert [t for start, stop, _ in segments for t in range(start, stop)] == list(range(length))
    for start, stop, size in segments[:-1]:
        assert size == chunk_size
        assert (stop - start) % size == 0
        assert stop - start <= max(max_tokens, chunk_size)
    start, stop, size = segments[-1]
    assert size <= chunk_size
    assert (stop - start) % size == 0 or size // 2 < stop - start < size


def test_segments_do_not_change_the_result(monkeypatch):
    inputs = make_inputs("mixed", 200)
    whole = chunk_kda(*inputs, chunk_size=16)
    monkeypatch.setattr(chunk, "SEGMENT_ELEMENTS", 1)
    assert_within_twice_plain(chunk_kda(*inputs, chunk_size=16), whole, oracle(inputs))


class MadeBytes(TorchDispatchMode):
    """List the bytes behind every result that is not a view of `given`."""

    def __init__(self, given):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.given:
                self.sizes.append(storage.nbytes())
        return result


def test_nothing_but_the_output_grows_with_the_length():
    inputs = make_inputs("weak", 10_000, B=1, H=1, K=64, V=64)
    with MadeBytes(inputs) as made:
        chunk_kda(*inputs)
    *others, output = sorted(made.sizes)
    assert output == inputs.v.nbytes
    assert others[-1] <= chunk.SEGMENT_ELEMENTS * 4 < output


def gradients(kda, inputs, state, weights):
    leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
    output, last = kda(*leaves[:5], initial_state=leaves[5])
    loss = (output * weights[0]).sum() + (last * weights[1]).sum()
    return torch.autograd.grad(loss, leaves)


def loss_weights(inputs, state):
    torch.manual_seed(2)
    return torch.randn_like(inputs.v), torch.randn_like(state)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("T", [1, 15, 65])
def test_fp64_gradients_are_those_of_the_recurrence(kind, T):
    inputs = make_inputs(kind, T).to(torch.float64)
    state = make_state(inputs).double()
    weights = loss_weights(inputs, state)
    found = gradients(chunk_kda, inputs, state, weights)
    expected = gradients(recurrent_kda, inputs, state, weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", GATES)
def test_fp32_gradients_are_within_twice_the_error_of_plain_torch(kind):
    inputs = make_inputs(kind, 65)
    state = make_state(inputs)
    weights = loss_weights(inputs, state)
    found = gradients(chunk_kda, inputs, state, weights)
    simple = gradients(recurrent_kda, inputs, state, weights)
    exact = gradients(
        recurrent_kda, inputs.to(torch.float64), state.double(), [x.double() for x in weights]
    )
    assert_within_twice_plain(found, simple, exact)


@pytest.mark.parametrize("kda", [chunk_kda, recurrent_kda])
def test_gradients_are_those_of_finite_differences(kda):
    inputs = make_inputs("weak", 5, B=1, H=2, K=3, V=2).to(torch.float64)
    leaves = [x.requires_grad_() for x in (*inputs, make_state(inputs).double())]
    assert torch.autograd.gradcheck(lambda *x: kda(*x[:5], initial_state=x[5]), leaves)
