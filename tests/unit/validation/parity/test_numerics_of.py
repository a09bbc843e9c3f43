from __future__ import annotations

import torch

from kimi_convert.model.numerics import RELEASED_CODE, SERVED, TRANSFORMERS, Numerics
from kimi_convert.validation.parity.numerics_of import differing, effective
from tests.tiny import tiny_config


def left(one, other, *, dtype=torch.float32, **fields):
    config = tiny_config("kimi_linear", **fields)
    return differing(*(effective(numerics, config, dtype) for numerics in (one, other)))


def test_only_what_a_model_can_tell_apart_counts():
    assert left(SERVED, TRANSFORMERS) == ("latent_norm_eps",)
    assert left(SERVED, TRANSFORMERS, rms_norm_eps=1e-6) == ("o_norm_eps",)
    assert left(SERVED, Numerics(o_norm_eps=None)) == ()
    assert left(SERVED, RELEASED_CODE) == ("router_weight", "latent_norm_eps")


def test_groups_and_narrow_dtypes_bring_their_own():
    groups = {"num_expert_group": 4, "topk_group": 2}
    assert "group_fill" in left(SERVED, RELEASED_CODE, **groups)
    assert {"beta", "decay_parameters"} <= set(left(SERVED, TRANSFORMERS, dtype=torch.bfloat16))
