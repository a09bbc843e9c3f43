"""The norms on Triton: at most twice as far from fp64 as torch is, forward and backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.norm import gated_rms_norm, kernel, l2_norm, rms_norm
from tests.unit.kernels.devices import DEVICE, DTYPES

pytest.importorskip("triton")

NORMS = {
    "rms": lambda x, _gate, weight, **kw: rms_norm(x, weight, eps=1e-5, **kw),
    "gated": lambda x, gate, weight, **kw: gated_rms_norm(x, gate, weight, eps=1e-5, **kw),
    "l2": lambda x, _gate, _weight, **kw: l2_norm(x, **kw),
}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tensors(dtype=torch.float32, *, rows=5, D=17, size=1.0, weight_dtype=None, seed=0):
    """Return x, gate, weight and the gradient of y."""
    make = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=make)
    x, gate, weight, d_y = size * draw(rows, D), draw(rows, D), draw(D), draw(rows, D)
    kinds = (dtype, dtype, weight_dtype or dtype, dtype)
    return [t.to(DEVICE, kind) for t, kind in zip((x, gate, weight, d_y), kinds, strict=True)]


def results(norm, x, gate, weight, d_y, **options):
    """Return y and the gradients of those inputs that it depends on."""
    inputs = [t.detach().requires_grad_() for t in (x, gate, weight)]
    y = norm(*inputs, **options)
    grads = torch.autograd.grad(y, inputs, d_y.to(y.dtype), allow_unused=True)
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def assert_as_near_as_torch(norm, *draws):
    """Compare the errors of several draws together: single maxima are a matter of luck."""
    errors = {"torch": [], "triton": []}
    for given in draws:
        oracle = results(norm, *(t.double() for t in given), backend="torch")
        for backend, found in errors.items():
            made = results(norm, *given, backend=backend)
            assert [y.shape for y in made] == [true.shape for true in oracle]
            found.append(
                [
                    (y.double() - true) / true.abs().max()
                    for y, true in zip(made, oracle, strict=True)
                ]
            )
    pooled = {
        backend: [torch.cat([e.flatten() for e in parts]) for parts in zip(*found, strict=True)]
        for backend, found in errors.items()
    }
    for found, plain in zip(pooled["triton"], pooled["torch"], strict=True):
        # Where torch happens to be exact, one rounding of the result is allowed.
        floor = torch.finfo(draws[0][0].dtype).eps
        assert found.abs().max() <= 2 * max(plain.abs().max().item(), floor)
        assert found.square().mean().sqrt() <= 2 * max(
            plain.square().mean().sqrt().item(), floor / 4
        )


@norms
@dtypes
@pytest.mark.parametrize("D", [1, 17, 100, 128, 512, 2304])
def test_as_near_to_fp64_as_torch(norm, dtype, D):
    if norm is NORMS["l2"] and D == 1:
        pytest.skip("x / |x| of a single value has a gradient of nothing but rounding")
    rows, draws = (17, 4) if D <= 128 else (3, 2)  # the interpreter is slow
    assert_as_near_as_torch(norm, *(tensors(dtype, rows=rows, D=D, seed=n) for n in range(draws)))


@norms
@pytest.mark.parametrize("size", [1e-12, 1e12], ids=["tiny", "huge"])
def test_as_near_as_torch_far_out(norm, size):
    assert_as_near_as_torch(norm, tensors(size=size))


@norms
def test_as_near_as_torch_over_several_turns(norm, monkeypatch):
    monkeypatch.setattr(kernel, "_BACKWARD_PROGRAMS", 2)
    assert_as_near_as_torch(norm, tensors(rows=25, D=512))


@norms
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float16, torch.float32), (torch.float32, torch.float16)],
    ids=["wide weight", "narrow weight"],
)
def test_as_near_as_torch_with_a_weight_of_another_dtype(norm, dtype, weight_dtype):
    assert_as_near_as_torch(norm, tensors(dtype, weight_dtype=weight_dtype))


@norms
def test_not_contiguous_is_as_contiguous(norm):
    given = tensors()
    strided = [torch.stack((t, t), dim=-1)[..., 0] for t in given]
    expected = results(norm, *given, backend="triton")
    found = results(norm, *strided, backend="triton")
    assert all(map(torch.equal, found, expected))


@norms
def test_rows_may_lie_apart_as_slices_of_a_merged_projection(norm):
    x, gate, weight, d_y = tensors()
    apart = [torch.cat((t, t, t), dim=-1)[:, 17:34] for t in (x, gate, d_y)]
    assert apart[0].stride() == (51, 1)
    expected = results(norm, x, gate, weight, d_y, backend="triton")
    found = results(norm, apart[0], apart[1], weight, apart[2], backend="triton")
    assert all(map(torch.equal, found, expected))


@norms
def test_no_rows_have_no_weight_gradient(norm):
    y, *grads = results(norm, *tensors(rows=0), backend="triton")
    assert y.shape == (0, 17)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@norms
def test_every_value_is_written_and_runs_are_bit_equal(norm, monkeypatch):
    given = tensors(rows=25, D=100)
    expected = results(norm, *given, backend="triton")
    empty = torch.empty
    poisoned = []

    def poison(*args, **kwargs):
        poisoned.append(empty(*args, **kwargs).fill_(float("nan")))
        return poisoned[-1]

    monkeypatch.setattr(torch, "empty", poison)
    found = results(norm, *given, backend="triton")
    assert len(poisoned) >= 2
    assert all(map(torch.equal, found, expected))


@norms
def test_triton_refuses_rows_that_are_too_wide(norm):
    x, gate, weight, _ = tensors(rows=1, D=16385)
    with pytest.raises(KernelInputError, match="x is too wide"):
        norm(x, gate, weight, backend="triton")


@pytest.mark.gpu
@norms
def test_a_gpu_takes_triton_by_itself(norm):
    x, gate, weight, _ = tensors()
    x.requires_grad_()
    assert "_Norm" in norm(x, gate, weight).grad_fn.name()


@pytest.mark.gpu
@norms
@dtypes
@pytest.mark.parametrize("D", [64, 128, 512, 2304, 7168])
@pytest.mark.parametrize("rows", [1, 1000, 4099])
def test_many_rows_on_a_gpu(norm, rows, dtype, D):
    assert_as_near_as_torch(norm, tensors(dtype, rows=rows, D=D))


@pytest.mark.gpu
@norms
def test_two_runs_on_a_gpu_are_equal(norm):
    given = tensors(torch.bfloat16, rows=50_000, D=128)
    found, again = (results(norm, *given, backend="triton") for _ in range(2))
    assert all(map(torch.equal, found, again))


@pytest.mark.gpu
@norms
def test_a_gpu_other_than_the_current_one_is_served(norm):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone")
    given = tensors()
    there = [t.to("cuda:1") for t in given]
    for found, expected in zip(results(norm, *there), results(norm, *given), strict=True):
        assert torch.equal(found.cpu(), expected.cpu())
