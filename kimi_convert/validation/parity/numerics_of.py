"""Which choices of an implementation matter for a given model: two runs compare only on the same.

`Numerics` names eight points where implementations of one checkpoint disagree. A model may be blind
to some of them (an eps that equals its own, a bias that it does not have); what is left decides
which runs must agree.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.model.numerics import GroupFill, Numerics, Precision, RouterWeight


def effective(numerics: Numerics, config: ModelConfig, dtype: torch.dtype) -> Numerics:
    """Return numerics with every choice that this model cannot tell apart set to one value."""
    eps, moe = config.rms_norm_eps, config.moe
    changes: dict[str, object] = {}
    for name in ("latent_norm_eps", "o_norm_eps"):
        if getattr(numerics, name) is None:
            changes[name] = eps
    if not config.kda_layers:
        changes["o_norm_eps"] = eps
        changes["beta"] = changes["decay_parameters"] = Precision.FP32
    if dtype in (torch.float32, torch.float64):
        changes |= dict.fromkeys(("beta", "decay_parameters", "router"), Precision.FP32)
    if moe is None or moe.num_groups == 1:
        changes["group_fill"] = GroupFill.NEGATIVE_INFINITY
    if moe is None:
        changes["router_weight"] = RouterWeight.UNBIASED
    return replace(numerics, **changes)  # pyright: ignore[reportArgumentType]  (names above)


def differing(one: Numerics, other: Numerics) -> tuple[str, ...]:
    """Return the names of the choices that differ."""
    names = (field.name for field in fields(Numerics))
    return tuple(name for name in names if getattr(one, name) != getattr(other, name))
