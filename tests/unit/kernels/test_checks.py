"""The checks: what fits, what does not, and what the refusal says."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.checks import expect, expect_dtype, expect_precision


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def test_dims_are_bound_by_name():
    assert expect("op", x=(ones(2, 3, 4), "B T D"), w=(ones(4, 1), "D 1")) == {
        "B": 2,
        "T": 3,
        "D": 4,
    }


def test_leading_dims_are_bound_together():
    x = ones(2, 3, 4)
    assert expect("op", x=(x, "... D"), gate=(x, "... D"), w=(ones(4), "D")) == {"D": 4}
    assert expect("op", x=(ones(4), "... D"), w=(ones(4), "D")) == {"D": 4}


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((2, 3), "B T D", "[B=2, T=3, D]"),
        ((2, 4, 5), "B T D", "[B=2, T=3, D]"),
        ((2, 3, 0), "B T D", "[B=2, T=3, D]"),
        ((2, 3, 5), "B T 4", "[B=2, T=3, 4]"),
        ((3, 3, 5), "... E", "[2, E]"),
        ((5, 6), "E E", "[E, E]"),
        ((), "... E", "[2, E]"),
    ],
)
def test_wrong_shape_is_refused_with_what_was_expected(shape, spec, expected):
    with pytest.raises(KernelInputError) as error:
        expect("op", x=(ones(2, 3), "B T"), y=(ones(2, 9), "... F"), z=(ones(*shape), spec))
    assert error.value.message == "z has the wrong shape"
    assert error.value.where == "op"
    assert error.value.expected == expected
    assert error.value.found == str(list(shape))
    assert f"[{', '.join(spec.split())}]" in error.value.hint


def test_only_batch_and_tokens_may_be_empty():
    assert expect("op", x=(ones(0, 0, 2), "B T D"))["T"] == 0
    with pytest.raises(KernelInputError, match="x has the wrong shape"):
        expect("op", x=(ones(2, 0), "B H"))


def test_what_is_no_tensor_is_refused():
    with pytest.raises(KernelInputError, match=r"x is not a tensor.*found NoneType"):
        expect("op", x=(cast("torch.Tensor", None), "B"))


def test_devices_must_be_the_same():
    with pytest.raises(KernelInputError, match=r"y is on the wrong device.*cpu.*found meta"):
        expect("op", x=(ones(2), "B"), y=(ones(2).to("meta"), "B"))


HALVES_AND_SINGLE = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE, ids=str)
@pytest.mark.parametrize("other", HALVES_AND_SINGLE, ids=str)
def test_up_to_single_precision_computes_in_single(dtype, other):
    tensors = {"x": ones(1, dtype=dtype), "y": ones(1, dtype=other)}
    assert expect_precision("op", **tensors) == torch.float32


def test_double_computes_in_double():
    assert expect_precision("op", x=ones(1).double(), y=ones(1).double()) == torch.float64


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_what_is_not_a_float_is_refused(dtype):
    with pytest.raises(KernelInputError, match=r"y has the wrong dtype.*bfloat16 or float16"):
        expect_precision("op", x=ones(1), y=ones(1, dtype=dtype))


def test_double_beside_single_is_refused():
    with pytest.raises(KernelInputError, match=r"y has the wrong dtype.*expected float64"):
        expect_precision("op", x=ones(1).double(), y=ones(1))


def test_exact_dtype():
    expect_dtype("op", torch.float32, x=ones(1))
    with pytest.raises(KernelInputError, match=r"x has the wrong dtype.*found float64"):
        expect_dtype("op", torch.float32, x=ones(1).double())
