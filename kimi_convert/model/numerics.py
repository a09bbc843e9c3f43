"""Where implementations of the same checkpoint disagree: one named option each.

`Numerics()` is what vLLM and SGLang serve, so that a number measured here is a number that a user
of the served model meets. The other presets reproduce one implementation exactly.

    option            vLLM, SGLang    transformers 5  released code  mlx-lm          llama.cpp
    router_weight     unbiased        unbiased        biased [1]     unbiased        unbiased
    latent_norm_eps   rms_norm_eps    1e-6            1e-6           rms_norm_eps    rms_norm_eps
    qk_norm           sum_eps         sum_eps         sum_eps        sum_eps [2]     floor
    o_norm_eps        1e-5 [3]        rms_norm_eps    rms_norm_eps   rms_norm_eps    rms_norm_eps
    beta              fp32            model [4]       fp32           fp32            model
    decay_parameters  fp32            model [4]       fp32           fp32            fp32
    group_fill        -inf            -inf            0              0               -
    router            model [5]       fp32            fp32           model           fp32

    [1] Its in-place addition of the correction bias aliases the scores, so the bias enters the
        combination weights: by far the largest split. Kimi-K3's released code no longer does it.
    [2] mean_eps before ml-explore/mlx-lm PR 1624.
    [3] A class default; config.json is not read for it.
    [4] The dtype that the model is loaded in; equal to fp32 for an fp32 model.
    [5] The one row that `Numerics()` does not follow: rounding router logits to bf16 changes
        which experts are chosen (sgl-project/sglang issue 33764 counts 5.3 % of the sets), and
        serving engines treat that as a fault. The default is fp32.

Released code is the `modeling_kimi.py` that ships with Kimi-Linear-48B-A3B. Not options, because
they change rounding alone: where `routed_scaling_factor` is multiplied in, and which attention
kernel runs. transformers' kimi_linear knows sigmoid routing only; here config.json decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch


class RouterWeight(StrEnum):
    """Which score of a chosen expert weighs its output."""

    UNBIASED = "unbiased"  # the score; the correction bias only takes part in the choice
    BIASED = "biased"  # the score with the correction bias


class QkNorm(StrEnum):
    """How KDA brings q and k to unit length."""

    SUM_EPS = "sum_eps"  # x / sqrt(sum x^2 + 1e-6)
    MEAN_EPS = "mean_eps"  # x / sqrt(sum x^2 + K 1e-6)
    FLOOR = "floor"  # x / max(|x|, rms_norm_eps)


class GroupFill(StrEnum):
    """What the choice score of an expert in a group that was not kept becomes."""

    NEGATIVE_INFINITY = "-inf"  # it can not be chosen
    ZERO = "0"  # it beats a kept expert whose biased score is below zero


class Precision(StrEnum):
    """The dtype of one computation or of stored parameters."""

    FP32 = "fp32"
    MODEL = "model"  # the dtype of the activations

    def resolve(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that this means in a model of `model_dtype`; never below it."""
        return model_dtype if self is Precision.MODEL else wide(model_dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in: fp32, and fp64 for fp64 models."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """One choice per disagreement; the module's table says who makes which."""

    router_weight: RouterWeight = RouterWeight.UNBIASED
    latent_norm_eps: float | None = None  # of q_a_norm and kv_a_norm; None is rms_norm_eps
    qk_norm: QkNorm = QkNorm.SUM_EPS
    o_norm_eps: float | None = 1e-5  # None is rms_norm_eps
    beta: Precision = Precision.FP32  # the sigmoid of KDA's write strength
    decay_parameters: Precision = Precision.FP32  # A_log and dt_bias as held in memory
    group_fill: GroupFill = GroupFill.NEGATIVE_INFINITY
    router: Precision = Precision.FP32  # the product of router weight and token


SERVED = Numerics()
TRANSFORMERS = Numerics(
    latent_norm_eps=1e-6,
    o_norm_eps=None,
    beta=Precision.MODEL,
    decay_parameters=Precision.MODEL,
)
RELEASED_CODE = Numerics(
    router_weight=RouterWeight.BIASED,
    latent_norm_eps=1e-6,
    o_norm_eps=None,
    group_fill=GroupFill.ZERO,
)
