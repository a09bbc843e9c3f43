"""What `chunk_kda` and `recurrent_kda` promise alike: values, states, dtypes, refusals."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.kda import chunk_kda, recurrent_kda
from tests.unit.kernels.kda.cases import (
    GATES,
    LENGTHS,
    assert_within_twice_plain,
    make_inputs,
    make_state,
    oracle,
    plain,
)

FORMS = pytest.mark.parametrize("kda", [chunk_kda, recurrent_kda])
HALVES = [torch.bfloat16, torch.float16]


@FORMS
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("kind", GATES)
def test_error_is_within_twice_that_of_plain_torch(kda, kind, T):
    inputs = make_inputs(kind, T)
    assert_within_twice_plain(kda(*inputs), plain(inputs), oracle(inputs))


@FORMS
@pytest.mark.parametrize("T", LENGTHS)
def test_error_from_an_initial_state_is_within_twice_that_of_plain_torch(kda, T):
    inputs = make_inputs("weak", T)
    state = make_state(inputs)
    assert_within_twice_plain(
        kda(*inputs, initial_state=state), plain(inputs, state=state), oracle(inputs, state=state)
    )


@FORMS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("T", [1, 17, 65])
def test_half_precision_rounds_once_at_the_end(kda, dtype, T):
    inputs = make_inputs("mixed", T).to(dtype)
    found = kda(*inputs)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    assert_within_twice_plain(found, plain(inputs), oracle(inputs))


@FORMS
def test_only_the_output_takes_the_dtype_of_v(kda):
    inputs = make_inputs("weak", 65)
    inputs = inputs._replace(v=inputs.v.bfloat16(), beta=inputs.beta.half())
    found = kda(*inputs)
    assert found[0].dtype == torch.bfloat16
    assert_within_twice_plain(found, plain(inputs), oracle(inputs))


@FORMS
def test_fp64_computes_in_fp64(kda):
    inputs = make_inputs("mixed", 70).to(torch.float64)
    state = make_state(inputs).double()
    found = kda(*inputs, initial_state=state)
    torch.testing.assert_close(found, oracle(inputs, state=state))  # 1e-7 relative, fp64's own


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("kind", ["zero", "mixed", "minus-20"])
def test_forms_agree_to_1e_5_of_the_largest_value(kind, T):
    inputs = make_inputs(kind, T, K=32, V=32)
    state = make_state(inputs)
    chunked, recurrent = (kda(*inputs, initial_state=state) for kda in (chunk_kda, recurrent_kda))
    for a, b in zip(chunked, recurrent, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@FORMS
@pytest.mark.parametrize(("K", "V"), [(1, 1), (16, 5), (5, 16), (128, 64)])
def test_any_head_sizes(kda, K, V):
    inputs = make_inputs("weak", 33, B=1, H=2, K=K, V=V).to(torch.float64)
    torch.testing.assert_close(kda(*inputs), oracle(inputs))


@FORMS
def test_released_head_size_keeps_the_error_bound(kda):
    inputs = make_inputs("weak", 300, K=128, V=128)
    assert_within_twice_plain(kda(*inputs), plain(inputs), oracle(inputs))


@FORMS
def test_scale_multiplies_the_output_and_leaves_the_state_alone(kda):
    inputs = make_inputs("weak", 20)
    output, state = kda(*inputs)
    doubled, same = kda(*inputs, scale=2 * 16**-0.5)  # a power of two scales without rounding
    assert torch.equal(doubled, 2 * output)
    assert torch.equal(same, state)


@FORMS
@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5)], ids=["no-tokens", "no-sequences"])
def test_nothing_in_gives_nothing_out_and_the_state_as_it_was(kda, B, T):
    inputs = make_inputs("weak", T, B=B)
    state = make_state(inputs)
    output, last = kda(*inputs, initial_state=state)
    assert output.shape == (B, T, 3, 24)
    assert torch.equal(last, state)
    assert kda(*inputs)[1].shape == state.shape
    assert not last.numel() or last.data_ptr() != state.data_ptr()


@FORMS
@pytest.mark.parametrize("T", [1, 40])
def test_inputs_are_not_modified(kda, T):
    inputs = make_inputs("mixed", T)
    state = make_state(inputs)
    before = [x.clone() for x in (*inputs, state)]
    output, last = kda(*inputs, initial_state=state)
    output.zero_()
    last.zero_()
    for x, kept in zip((*inputs, state), before, strict=True):
        assert torch.equal(x, kept)


@FORMS
@pytest.mark.parametrize("cut", [0, 1, 15, 16, 33, 64, 69, 70])
def test_a_sequence_may_be_cut_anywhere(kda, cut):
    inputs = make_inputs("mixed", 70)
    state = make_state(inputs)
    first, between = kda(*inputs.tokens(0, cut), initial_state=state)
    second, last = kda(*inputs.tokens(cut, 70), initial_state=between)
    assert_within_twice_plain(
        (torch.cat((first, second), dim=1), last),
        plain(inputs, state=state),
        oracle(inputs, state=state),
    )


@FORMS
@pytest.mark.parametrize("T", [1, 31, 63, 64, 65])
def test_a_prefix_gives_the_same_outputs_when_tokens_follow(kda, T):
    inputs = make_inputs("mixed", 100)
    prefix = inputs.tokens(0, T)
    longer = kda(*inputs)[0][:, :T]
    assert_within_twice_plain((longer,), plain(prefix)[:1], oracle(prefix)[:1])


@FORMS
def test_an_output_depends_on_no_later_token(kda):
    inputs, other = make_inputs("mixed", 100), make_inputs("weak", 100, seed=5)
    for T in (1, 40, 64, 99):
        changed = [torch.cat((a[:, :T], b[:, T:]), 1) for a, b in zip(inputs, other, strict=True)]
        assert torch.equal(kda(*changed)[0][:, :T], kda(*inputs)[0][:, :T])


@FORMS
def test_two_runs_are_equal(kda):
    inputs = make_inputs("weak", 100)
    first, second = kda(*inputs), kda(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@FORMS
def test_strides_do_not_matter(kda):
    inputs = make_inputs("mixed", 40)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not strided[0].is_contiguous()
    for a, b in zip(kda(*strided), kda(*inputs), strict=True):
        assert torch.equal(a, b)


def bad(name, change):
    inputs = make_inputs("weak", 5)._asdict()
    inputs["initial_state"] = make_state(make_inputs("weak", 5))
    inputs[name] = change(inputs[name])
    return inputs


@FORMS
@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("q", lambda x: x[0], "[5, 3, 16]"),
        ("q", lambda x: x[..., :0], "[2, 5, 3, 0]"),
        ("q", lambda x: x.long(), "int64"),
        ("q", lambda x: x.tolist(), "list"),
        ("k", lambda x: x[:, :4], "[2, 4, 3, 16]"),
        ("k", lambda x: x[..., :8], "[2, 5, 3, 8]"),
        ("k", lambda x: x.to("meta"), "meta"),
        ("v", lambda x: x[:, :, :1], "[2, 5, 1, 24]"),
        ("v", lambda x: x[..., :0], "[2, 5, 3, 0]"),
        ("v", lambda x: x.to(torch.complex64), "complex64"),
        ("g", lambda x: x[..., 0], "[2, 5, 3]"),
        ("g", lambda x: x.bool(), "bool"),
        ("beta", lambda x: x[..., None], "[2, 5, 3, 1]"),
        ("beta", lambda x: x[:1], "[1, 5, 3]"),
        ("initial_state", lambda x: x.mT, "[2, 3, 24, 16]"),
        ("initial_state", lambda x: x.bfloat16(), "bfloat16"),
        ("initial_state", lambda x: x.double(), "float64"),
    ],
)
def test_bad_argument_is_named(kda, name, change, found):
    with pytest.raises(KernelInputError) as error:
        kda(**bad(name, change))
    assert error.value.message.startswith(f"{name} ")
    assert error.value.where == kda.__name__
    assert error.value.found == found
    assert error.value.expected
    assert error.value.hint


@FORMS
def test_double_is_not_mixed_with_single(kda):
    with pytest.raises(KernelInputError, match=r"q has the wrong dtype .*expected float64"):
        kda(**bad("g", lambda x: x.double()))


@pytest.mark.parametrize("chunk_size", [0, -32, 3, 48, 512])
def test_chunk_size_is_a_power_of_two_in_range(chunk_size):
    with pytest.raises(KernelInputError, match="chunk_size"):
        chunk_kda(*make_inputs("weak", 5), chunk_size=chunk_size)
