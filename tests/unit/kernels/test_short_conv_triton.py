"""The short convolution on Triton: at most twice as far from fp64 as torch is, both ways.

On a GPU where there is one, else in Triton's interpreter, which takes milliseconds for a token.
"""

from __future__ import annotations

import pytest
import torch

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.short_conv import short_conv, short_conv_qkv, short_conv_qkv_
from tests.unit.kernels.devices import DEVICE, DTYPES
from tests.unit.kernels.kda.cases import assert_within_twice_plain

pytest.importorskip("triton")
from kimi_convert.kernels.short_conv import backward, kernel

IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
NAMES = ("x", "weight", "state")


@pytest.fixture
def short_tiles(monkeypatch):
    """Several tiles of few tokens: the interpreter is slow."""
    monkeypatch.setattr(kernel, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(backward, "_BLOCK_TOKENS", 4)


def tensors(T, dtype=torch.float32, *, B=2, P=5, W=4, N=None, size=1.0, seed=0):
    """x, weight, state, and the gradients of y and of the new state."""
    torch.manual_seed(seed)
    shapes = ((B, T, P), (P, 1, W), (N or B, P, W - 1), (B, T, P), (N or B, P, W - 1))
    return [(size * torch.randn(shape)).to(DEVICE, dtype) for shape in shapes]


def results(x, weight, state, d_y, d_last, **options):
    """y, the new state, and the gradients of x, weight and state; state and d_last may be None."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, state) if t is not None]
    y, last = short_conv(*leaves[:2], state=leaves[2] if state is not None else None, **options)
    outputs, seeds = ((y,), (d_y,)) if d_last is None else ((y, last), (d_y, d_last))
    return [y.detach(), last.detach(), *torch.autograd.grad(outputs, leaves, seeds)]


def check(given, **options):
    found = results(*given, backend="triton", **options)
    plain = results(*given, backend="torch", **options)
    wide = [t if t is None else t.double() for t in given]
    of_all = zip(found, plain, results(*wide, **options), strict=True)
    there = [of_one for of_one in of_all if of_one[0].numel()]  # a single tap has no state
    assert_within_twice_plain(*zip(*there, strict=True))
    assert torch.equal(found[1], plain[1])  # a copy


@DTYPE
@pytest.mark.parametrize("T", [1, 2, 17])
def test_error_is_within_twice_that_of_torch(T, dtype):
    check(tensors(T, dtype, B=2 if T == 2 else 1))  # 17 is a tile and a token


@pytest.mark.parametrize("W", [1, 2, 3, 8])
def test_any_number_of_taps(W):
    check(tensors(4, B=1, W=W))


@pytest.mark.parametrize("P", [1, 130])
def test_any_number_of_channels(P):
    check(tensors(5, B=1, P=P))


def test_channels_of_several_programs(monkeypatch):
    monkeypatch.setattr(kernel, "_NUM_WARPS", 1)
    monkeypatch.setattr(backward, "_NUM_WARPS", 1)
    check(tensors(3, B=1, P=300))


@pytest.mark.parametrize("without", ["state", "gradient of the new state", "both"])
def test_no_state_and_no_gradient_of_one(without, short_tiles):
    x, weight, state, d_y, d_last = tensors(5, B=1)
    state = state if without.startswith("gradient") else None
    check((x, weight, state, d_y, d_last if without == "state" else None))


@pytest.mark.parametrize("programs", [1, 3])
def test_several_tiles_a_program(programs, short_tiles, monkeypatch):
    monkeypatch.setattr(backward, "_PROGRAMS", programs)
    check(tensors(9, B=1))


# The interpreter's numpy says what a GPU does not: exp of a large value overflows, as it may.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("size", [1e-6, 1e3], ids=["tiny", "huge"])
def test_tiny_and_huge_inputs(size):
    check(tensors(4, B=1, size=size))


LENGTHS = [0, 1, 5, 0]


@DTYPE
def test_packed_sequences_equal_each_by_itself(dtype, short_tiles):
    x, weight, state, d_y, d_last = tensors(sum(LENGTHS), dtype, B=1, N=len(LENGTHS))
    bounds = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0)
    found = results(x, weight, state, d_y, d_last, cu_seqlens=bounds, backend="triton")
    d_weight = torch.zeros_like(weight, dtype=torch.float64)
    for n, length in enumerate(LENGTHS):
        tokens, one = slice(int(bounds[n]), int(bounds[n + 1])), slice(n, n + 1)
        if length == 0:
            assert torch.equal(found[1][one], state[one])
            assert torch.equal(found[4][one], d_last[one])
            continue
        alone = results(
            x[:, tokens], weight, state[one], d_y[:, tokens], d_last[one], backend="triton"
        )
        for of_all, of_one in zip(
            (found[0][:, tokens], found[1][one], found[2][:, tokens], found[4][one]),
            (alone[0], alone[1], alone[2], alone[4]),
            strict=True,
        ):
            assert torch.equal(of_all, of_one)
        d_weight += alone[3].double()
    # Each of the parts was rounded once.
    bound = len(LENGTHS) * torch.finfo(dtype).eps * d_weight.abs().max()
    assert (found[3] - d_weight).abs().max() <= bound


def test_packed_sequences_without_states(short_tiles):
    x, weight, _, d_y, d_last = tensors(sum(LENGTHS), B=1, N=len(LENGTHS))
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).to(DEVICE)
    check((x, weight, None, d_y, d_last), cu_seqlens=bounds)


WIDTHS = (5, 3, 9)


def three(T, dtype=torch.float32, **shape):
    """Inputs, weights and states of q, k and v, and the gradients of what becomes of them."""
    of_each = [tensors(T, dtype, P=P, seed=P, **shape) for P in WIDTHS]
    return tuple(tuple(of_kind) for of_kind in zip(*of_each, strict=True))


def gradients_of_three(inputs, weights, states, d_ys, d_lasts):
    leaves = [t.detach().requires_grad_() for t in (*inputs, *weights, *states)]
    parts = tuple(leaves[:3]), tuple(leaves[3:6]), tuple(leaves[6:])
    ys, lasts = short_conv_qkv(*parts[:2], states=parts[2], backend="triton")
    found = torch.autograd.grad((*ys, *lasts), leaves, (*d_ys, *d_lasts))
    return [tuple(x.detach() for x in (*ys, *lasts)), found]


@DTYPE
def test_three_at_once_equal_each_by_itself(dtype):
    given = three(3, dtype, B=1)
    outputs, found = gradients_of_three(*given)
    for n in range(3):
        y, last, *expected = results(*(of_kind[n] for of_kind in given), backend="triton")
        assert torch.equal(outputs[n], y)
        assert torch.equal(outputs[3 + n], last)
        assert all(map(torch.equal, found[n::3], expected))


def test_inputs_may_differ_in_dtype_and_have_states_or_not():
    inputs, weights, states, *_ = three(2, B=1)
    inputs = (inputs[0].half(), *inputs[1:])
    states = (states[0].half(), None, states[2])
    ys, lasts = short_conv_qkv(inputs, weights, states=states, backend="triton")
    for n in range(3):
        y, last = short_conv(inputs[n], weights[n], state=states[n], backend="triton")
        assert torch.equal(ys[n], y)
        assert torch.equal(lasts[n], last)


def test_rows_may_lie_apart_as_slices_of_a_merged_projection():
    inputs, weights, states, d_ys, d_lasts = three(2)
    slices = torch.cat(inputs, dim=-1).split(WIDTHS, dim=-1)
    d_slices = torch.cat(d_ys, dim=-1).split(WIDTHS, dim=-1)
    assert not slices[1].is_contiguous()
    apart = gradients_of_three(slices, weights, states, d_slices, d_lasts)
    expected = gradients_of_three(inputs, weights, states, d_ys, d_lasts)
    for found_part, expected_part in zip(apart, expected, strict=True):
        assert all(map(torch.equal, found_part, expected_part))


def test_any_strides_are_served():
    x, weight, state, d_y, d_last = tensors(2)
    columns = [t.mT.contiguous().mT for t in (x, weight, state, d_y, d_last)]
    same_everywhere = d_y[:1, :1, :1].expand_as(d_y)  # as the gradient of a sum has them
    for gradient in (columns[3], same_everywhere):
        found = results(*columns[:3], gradient, columns[4], backend="triton")
        expected = results(x, weight, state, gradient.contiguous(), d_last, backend="triton")
        assert all(map(torch.equal, found, expected))


def test_gradient_of_one_result_alone():
    inputs, weights, states, *_ = three(2, B=1)
    leaves = [x.requires_grad_() for x in inputs]
    ys, lasts = short_conv_qkv(inputs, weights, states=states, backend="triton")
    found = torch.autograd.grad(ys[1].sum(), leaves, retain_graph=True)
    assert [bool(gradient.any()) for gradient in found] == [False, True, False]
    found = torch.autograd.grad(lasts[2].sum(), leaves)
    assert [bool(gradient.any()) for gradient in found] == [False, False, True]


@DTYPE
@pytest.mark.parametrize("cuts", [[1] * 4, [2, 0, 4]], ids=str)
def test_steps_in_place_and_parts_equal_the_prefill(cuts, dtype):
    inputs, weights, states, *_ = three(sum(cuts), dtype, B=1)
    ys, lasts = short_conv_qkv(inputs, weights, states=states, backend="triton")
    held, kept = tuple(x.clone() for x in states), states
    start, parts, steps = 0, [], []
    for size in cuts:
        tokens = tuple(x[:, start : start + size] for x in inputs)
        part, kept = short_conv_qkv(tokens, weights, states=kept, backend="triton")
        parts.append(part)
        steps.append(short_conv_qkv_(tokens, weights, held, backend="triton"))
        start += size
    for pieces, last in ((parts, kept), (steps, held)):
        whole = (torch.cat(of_one, dim=1) for of_one in zip(*pieces, strict=True))
        assert all(map(torch.equal, whole, ys))
        assert all(map(torch.equal, last, lasts))


def test_many_tokens_in_place_are_the_same(short_tiles):
    inputs, weights, states, *_ = three(5, B=1)
    ys, lasts = short_conv_qkv(inputs, weights, states=states, backend="triton")
    assert all(map(torch.equal, short_conv_qkv_(inputs, weights, states, backend="triton"), ys))
    assert all(map(torch.equal, states, lasts))


def test_more_tokens_do_not_change_what_came_before(short_tiles):
    x, weight, state, *_ = tensors(9, B=1)
    longer, _ = short_conv(x, weight, state=state, backend="triton")
    shorter, _ = short_conv(x[:, :6], weight, state=state, backend="triton")
    assert torch.equal(longer[:, :6], shorter)


@DTYPE
def test_two_runs_are_equal_and_every_element_is_written(monkeypatch, dtype):
    given = tensors(3, dtype, B=1)
    expected = results(*given, backend="triton")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    found = results(*given, backend="triton")
    assert all(map(torch.equal, found, expected))


def test_inputs_are_not_modified(short_tiles):
    given = tensors(5, B=1)
    before = [t.clone() for t in given]
    results(*given, backend="triton")
    assert all(map(torch.equal, given, before))


def test_a_nan_shows_where_it_is_seen_and_nowhere_else():
    x, weight, state, *_ = tensors(9, B=1)
    x[0, 3, 2] = torch.nan
    y, _ = short_conv(x, weight, state=state, backend="triton")
    seen = torch.zeros_like(y, dtype=torch.bool)
    seen[0, 3:7, 2] = True
    assert torch.equal(y.isnan(), seen)


def test_too_many_taps_are_refused_or_left_to_torch():
    x, weight, state, *_ = tensors(3, W=9)
    with pytest.raises(KernelInputError, match="too wide"):
        short_conv(x, weight, state=state, backend="triton")
    assert short_conv(x, weight, state=state)[0].isfinite().all()


def test_doubles_are_refused():
    x, weight, *_ = (t.double() for t in tensors(3))
    with pytest.raises(KernelInputError, match="fp64"):
        short_conv(x, weight, backend="triton")


@pytest.mark.gpu
def test_a_gpu_takes_triton_by_itself():
    x, weight, *_ = tensors(3)
    y, _ = short_conv(x, weight.requires_grad_())
    assert "_ShortConv" in y.grad_fn.name()


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize("B", [1, 3])
def test_wide_inputs_on_a_gpu(B, T, dtype):
    check(tensors(T, dtype, B=B, P=4096))


@pytest.mark.gpu
@DTYPE
def test_many_packed_sequences_on_a_gpu(dtype):
    lengths = torch.randint(0, 40, (300,)).tolist()
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    check(tensors(sum(lengths), dtype, B=1, P=1000, N=300), cu_seqlens=bounds)


@pytest.mark.gpu
@DTYPE
def test_two_runs_on_a_gpu_are_equal(dtype):
    given = tensors(3000, dtype, P=4096)
    found, again = (results(*given, backend="triton") for _ in range(2))
    assert all(map(torch.equal, found, again))


@pytest.mark.gpu
@DTYPE
def test_a_graph_replays_a_step_on_new_inputs(dtype):
    inputs, weights, states, *_ = three(6, dtype)
    eager, replayed = (tuple(x.clone() for x in states) for _ in range(2))
    token = tuple(x[:, :1].clone() for x in inputs)
    short_conv_qkv_(token, weights, tuple(x.clone() for x in states))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = short_conv_qkv_(token, weights, replayed)
    for held, x in zip(replayed, states, strict=True):
        held.copy_(x)
    for t in range(6):
        step = tuple(x[:, t : t + 1].contiguous() for x in inputs)
        for held, x in zip(token, step, strict=True):
            held.copy_(x)
        graph.replay()
        assert all(map(torch.equal, outputs, short_conv_qkv_(step, weights, eager)))
    assert all(map(torch.equal, replayed, eager))


@pytest.mark.gpu
def test_a_gpu_other_than_the_current_one_is_served():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone")
    given = tensors(20)
    there = [t.to("cuda:1") for t in given]
    for found, expected in zip(results(*there), results(*given), strict=True):
        assert found.device == torch.device("cuda:1")
        assert torch.equal(found.cpu(), expected.cpu())
