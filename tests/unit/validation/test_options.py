"""Options that nothing can run with are refused where they are made."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.errors import UsageError
from kimi_convert.validation.options import BACKENDS, DTYPES, ValidationOptions


@pytest.mark.parametrize(
    "name",
    ["sequence_length", "max_tokens", "max_tokens_per_kind", "batch_rows", "consistency_tokens"],
)
def test_sizes_below_1_are_refused(name):
    assert getattr(ValidationOptions(**{name: 1}), name) == 1
    with pytest.raises(UsageError, match=name):
        ValidationOptions(**{name: 0})


def test_dtypes_are_those_that_models_run_in():
    resolved = [ValidationOptions(dtype=dtype).torch_dtype for dtype in DTYPES]
    assert resolved == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(UsageError, match="int8"):
        ValidationOptions(dtype="int8")


def test_backends_are_those_of_the_kernels():
    assert BACKENDS == ("torch", "triton")
    assert [ValidationOptions(backend=name).backend for name in (None, *BACKENDS)] == [
        None,
        *BACKENDS,
    ]
    with pytest.raises(UsageError, match="cuda"):
        ValidationOptions(backend="cuda")
