from __future__ import annotations

import pytest
import torch

from kimi_convert.validation.bounds import (
    coarsest,
    cosine_bound,
    error_bound,
    kl_bound,
    stage_bound,
    tie_margin,
)


def test_fp32_is_one_promise_for_any_depth():
    assert error_bound(torch.float32, 1) == error_bound(torch.float32, 61) == 1e-5
    assert error_bound(torch.float64, 8) == 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_grow_with_the_root_of_depth(dtype):
    assert error_bound(dtype, 4) == 2 * error_bound(dtype, 1) == 8 * torch.finfo(dtype).eps


def test_inside_a_model_the_bound_is_that_of_the_depth():
    first, last = (stage_bound(torch.float32, layer_idx) for layer_idx in (0, 60))
    assert 1.8e-6 < first < 2e-6
    assert last == 1e-5
    assert stage_bound(torch.float32, -1) == first  # the embedding


def test_two_runs_are_judged_by_the_coarser_dtype():
    assert coarsest([torch.float64, torch.float16, torch.float32]) is torch.float16
    assert coarsest([torch.float16, torch.bfloat16]) is torch.bfloat16


def test_bounds_of_logits_hold_for_every_error_that_is_allowed():
    torch.manual_seed(0)
    bound = 1e-3
    logits = 5 * torch.randn(200, 300, dtype=torch.float64)
    largest = logits.abs().max().item()
    # The worst that is allowed: every logit off by the whole bound, up or down.
    other = logits + bound * largest * torch.randn_like(logits).sign()
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).max().item()
    assert kl <= kl_bound(bound, largest)
    assert kl > kl_bound(bound, largest) / 10
    flipped = other.argmax(-1) != logits.argmax(-1)
    gap = logits.amax(-1) - logits.gather(-1, other.argmax(-1)[:, None])[:, 0]
    assert flipped.any()
    assert gap.max().item() <= tie_margin(bound, largest)
    rms = 2 * bound * logits.norm(dim=-1, keepdim=True)
    tilted = logits + rms * torch.nn.functional.normalize(torch.randn_like(logits), dim=-1)
    cosine = 1 - torch.cosine_similarity(tilted, logits, dim=-1).min().item()
    assert cosine <= cosine_bound(bound)
