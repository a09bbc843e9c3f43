"""The short convolution: torch's conv1d, prefill, steps, and the state between them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv1d, silu

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.short_conv import reference, short_conv, short_conv_qkv, short_conv_qkv_

LENGTHS = [1, 2, 3, 4, 17, 100]


def inputs(T, *, B=2, P=6, W=4, dtype=torch.float64):
    torch.manual_seed(0)
    x, weight, state = torch.randn(B, T, P), torch.randn(P, 1, W), torch.randn(B, P, W - 1)
    return x.to(dtype), weight.to(dtype), state.to(dtype)


def by_conv1d(x, weight, state):
    padded = torch.cat((state, x.mT), dim=-1)
    y = silu(conv1d(padded, weight, groups=weight.shape[0])).mT
    return y, padded[..., x.shape[1] :]


@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("T", LENGTHS)
def test_is_conv1d_then_silu(T, W):
    x, weight, state = inputs(T, W=W)
    torch.testing.assert_close(short_conv(x, weight, state=state), by_conv1d(x, weight, state))


@pytest.mark.parametrize("T", LENGTHS)
def test_no_state_is_zeros_before_the_start(T):
    x, weight, state = inputs(T)
    y, last = short_conv(x, weight)
    zeros_y, zeros_last = short_conv(x, weight, state=torch.zeros_like(state))
    assert torch.equal(y, zeros_y)
    assert torch.equal(last, zeros_last)


def test_last_tap_meets_the_current_token():
    x, weight, _ = inputs(9)
    weight = torch.zeros_like(weight)
    weight[:, 0, 3] = 2.0
    torch.testing.assert_close(short_conv(x, weight)[0], silu(2 * x))


def test_state_holds_the_last_inputs_oldest_first():
    x, weight, state = inputs(2)
    _, last = short_conv(x, weight, state=state)
    assert torch.equal(last, torch.stack((state[:, :, 2], x[:, 0], x[:, 1]), dim=-1))


@pytest.mark.parametrize("cuts", [[1] * 20, [0, 2, 18], [7, 13], [19, 1]], ids=str)
def test_steps_and_parts_give_the_prefill(cuts):
    x, weight, state = inputs(20)
    whole, last = short_conv(x, weight, state=state)
    parts = []
    for part in x.split(cuts, dim=1):
        y, state = short_conv(part, weight, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert torch.equal(state, last)


def test_segments_do_not_change_the_result(monkeypatch):
    x, weight, state = inputs(50)
    whole = short_conv(x, weight, state=state)
    monkeypatch.setattr(reference, "SEGMENT_ELEMENTS", 1)  # one token each
    torch.testing.assert_close(short_conv(x, weight, state=state), whole)


@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5)], ids=["no-tokens", "no-sequences"])
def test_nothing_in_gives_nothing_out_and_the_state_as_it_was(B, T):
    x, weight, state = inputs(T, B=B)
    y, last = short_conv(x, weight, state=state)
    assert y.shape == x.shape
    assert torch.equal(last, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_once_at_the_end(dtype):
    x, weight, state = inputs(30, dtype=dtype)
    y, last = short_conv(x, weight, state=state)
    wide, _ = short_conv(x.float(), weight.float(), state=state.float())
    assert torch.equal(y, wide.to(dtype))
    assert last.dtype == dtype


def test_fp32_taps_serve_half_precision_inputs():
    x, weight, state = inputs(30, dtype=torch.bfloat16)
    y, last = short_conv(x, weight.float(), state=state)
    assert torch.equal(y, short_conv(x, weight, state=state)[0])
    assert last.dtype == torch.bfloat16


@pytest.mark.parametrize("T", [0, 1, 30])
@pytest.mark.parametrize("W", [2, 4])
def test_inputs_are_not_modified_and_the_state_is_its_own(T, W):
    arguments = inputs(T, B=1, W=W)
    before = [t.clone() for t in arguments]
    y, last = short_conv(arguments[0], arguments[1], state=arguments[2])
    kept = last.clone()
    y.zero_()
    assert torch.equal(last, kept)
    assert last.untyped_storage().nbytes() == last.numel() * last.element_size()
    last.zero_()
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_gradients_are_those_of_finite_differences():
    x, weight, state = (t.requires_grad_() for t in inputs(5, P=2))
    assert torch.autograd.gradcheck(lambda x, w, s: short_conv(x, w, state=s), (x, weight, state))


LENGTHS_PACKED = [0, 1, 2, 7, 0, 3, 0]  # of fewer tokens than the state, and none


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_are_each_by_itself(offsets):
    x, weight, _ = inputs(sum(LENGTHS_PACKED), B=1)
    state = torch.randn(len(LENGTHS_PACKED), 6, 3, dtype=x.dtype)
    cu_seqlens = torch.tensor([0, *LENGTHS_PACKED]).cumsum(0).to(offsets)
    y, last = short_conv(x, weight, state=state, cu_seqlens=cu_seqlens)
    for n, part in enumerate(x.split(LENGTHS_PACKED, dim=1)):
        alone, kept = short_conv(part, weight, state=state[n : n + 1])
        assert torch.equal(y[:, cu_seqlens[n] : cu_seqlens[n + 1]], alone)
        assert torch.equal(last[n : n + 1], kept)


def three(T, *, B=2, widths=(6, 5, 8), W=4, dtype=torch.float64):
    return tuple(zip(*(inputs(T, B=B, P=P, W=W, dtype=dtype) for P in widths), strict=True))


@pytest.mark.parametrize("T", [0, 1, 20])
def test_three_at_once_are_each_by_itself(T):
    xs, weights, states = three(T)
    ys, lasts = short_conv_qkv(xs, weights, states=states)
    for n in range(3):
        y, last = short_conv(xs[n], weights[n], state=states[n])
        assert torch.equal(ys[n], y)
        assert torch.equal(lasts[n], last)


@pytest.mark.parametrize("T", [0, 1, 20])
def test_the_step_in_place_is_the_other_and_writes_over_its_states(T):
    xs, weights, states = three(T)
    ys, lasts = short_conv_qkv(xs, weights, states=states)
    held = [state.data_ptr() for state in states]
    found = short_conv_qkv_(xs, weights, states)
    assert all(map(torch.equal, found, ys))
    assert all(map(torch.equal, states, lasts))
    assert [state.data_ptr() for state in states] == held


def test_no_gradient_flows_through_a_step_in_place():
    xs, weights, states = three(1)
    weights[0].requires_grad_()
    assert not short_conv_qkv_(xs, weights, states)[0].requires_grad


def replaced(values, index, value):
    return (*values[:index], value, *values[index + 1 :])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (r"inputs\[1\] ", lambda x, w, s: (replaced(x, 1, x[1][:, :3]), w, s)),
        (r"inputs\[2\] ", lambda x, w, s: (replaced(x, 2, [1.0]), w, s)),
        ("inputs ", lambda x, w, s: (x[:2], w, s)),
        (r"weights\[2\] ", lambda x, w, s: (x, replaced(w, 2, w[1]), s)),
        (r"weights\[1\] ", lambda x, w, s: (x, replaced(w, 1, w[1][..., :3]), s)),
        ("weights ", lambda x, w, s: (x, (*w, w[0]), s)),
        (r"states\[0\] ", lambda x, w, s: (x, w, replaced(s, 0, s[0][:1]))),
        (r"states\[2\] ", lambda x, w, s: (x, w, replaced(s, 2, s[2].float()))),
        ("states ", lambda x, w, s: (x, w, s[:1])),
    ],
)
@pytest.mark.parametrize("convolve", [short_conv_qkv, short_conv_qkv_])
def test_bad_argument_of_three_is_named(convolve, name, change):
    xs, weights, states = change(*three(5))
    with pytest.raises(KernelInputError, match=f"^{name}"):
        convolve(xs, weights, states=states)


@pytest.mark.parametrize("state", [None, torch.zeros(2, 3, 8).mT], ids=["none", "strided"])
def test_a_state_that_cannot_be_written_to_is_named(state):
    xs, weights, states = three(5, dtype=torch.float32)
    with pytest.raises(KernelInputError, match=r"^states\[2\] cannot be written to"):
        short_conv_qkv_(xs, weights, replaced(states, 2, state))


@pytest.mark.parametrize(
    ("B", "cu_seqlens", "problem"),
    [
        (1, [0, 3], "cu_seqlens is not valid"),
        (1, [1, 5], "cu_seqlens is not valid"),
        (1, [0, 4, 2, 5], "cu_seqlens is not valid"),
        (1, [0.0, 5.0], "cu_seqlens is not valid"),
        (2, [0, 5], "packed sequences have the wrong shape"),
        (1, [0, 2, 5], "state has the wrong shape"),
    ],
)
def test_bad_packing_is_named(B, cu_seqlens, problem):
    x, weight, state = inputs(5, B=B)
    with pytest.raises(KernelInputError, match=problem):
        short_conv(x, weight, state=state, cu_seqlens=torch.tensor(cu_seqlens))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x, w, s: (x[0], w, s)),
        ("weight", lambda x, w, s: (x, w[:, 0], s)),
        ("weight", lambda x, w, s: (x, w.expand(6, 2, 4), s)),
        ("weight", lambda x, w, s: (x, w[:5], s)),
        ("weight", lambda x, w, s: (x, w.long(), s)),
        ("weight", lambda x, w, s: (x, w.float(), s)),
        ("state", lambda x, w, s: (x, w, s.mT)),
        ("state", lambda x, w, s: (x, w, s[..., :2])),
        ("state", lambda x, w, s: (x, w, s[:1])),
        ("state", lambda x, w, s: (x, w, s.float())),
        ("state", lambda x, w, s: (x, w, s.to("meta"))),
    ],
)
def test_bad_argument_is_named(name, change):
    x, weight, state = change(*inputs(5))
    with pytest.raises(KernelInputError, match=f"^{name} "):
        short_conv(x, weight, state=state)
