"""The short convolution: torch's conv1d, prefill, steps, and the state between them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv1d, silu

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels import short_conv as module
from kimi_convert.kernels.short_conv import short_conv

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
    monkeypatch.setattr(module, "SEGMENT_ELEMENTS", 1)  # one token each
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
