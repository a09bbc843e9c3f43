"""The operations that make weights of a hybrid from weights of its teacher, without data.

Weights are [out, in]; everything is computed in fp32. A head's key and value in MLA are

    k_nope = W_uk diag(gamma) c / rms(c),   v = W_uv diag(gamma) c / rms(c),   c = W_dk x

with the latent c = W_dk x, its norm's weight gamma and the rows W_uk, W_uv of kv_b. KDA gives
keys unit length, so the one positive factor 1/rms(c) per token drops out and the fold
W_uk diag(gamma) W_dk is exact for keys, and likewise for a low-rank query. For values it is exact
up to that factor, which KDA's output norm takes out again where the values agree.

Scales that depend on data are estimated: x is the block's normalised input times the norm's
weight w, taken as uncorrelated with unit variance before w, so E[x x^T] = diag(w^2).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.bailing_hybrid import LOWER_BOUND
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.rules import Op

_MOST_OF_BOUND = 0.9  # of the fastest decay that a bounded law has
_TINY = torch.finfo(torch.float32).tiny  # a power below it counts as none


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One target tensor to be made."""

    sources: tuple[
        torch.Tensor, ...
    ]  # fp32, in the order of the rule; this job may overwrite them
    shape: tuple[int, ...]
    target: str  # parameter name; seeds what is random
    config: ModelConfig  # of the source
    recipe: Recipe


def keep_query(job: Job) -> torch.Tensor:
    """Make the query of a kept layer fit a layer that does not rotate.

    The rotated rows of every head become 0 (`rope = "drop"`). YaRN's factor on the softmax scale,
    which Kimi-Linear does not have, is folded into all rows; this is exact.
    """
    (query,) = job.sources
    mla = job.config.mla
    scale = mla.softmax_scale * math.sqrt(mla.qk_head_dim)
    heads = _by_head(query, mla.num_heads) * scale
    heads[:, mla.qk_nope_head_dim :] = 0
    return heads.flatten(0, 1)


def take_query(job: Job) -> torch.Tensor:
    """Take the rows of q that are not rotated. Exact: their scale is lost in KDA's unit norm."""
    return _nope_rows(job.sources[0], job.config)


def fold_query(job: Job) -> torch.Tensor:
    """Multiply out a low-rank query, its norm's weight included. Exact but for a scale."""
    down, norm, up = job.sources
    return (_nope_rows(up, job.config) * norm) @ down


def fold_key(job: Job) -> torch.Tensor:
    """Multiply out the keys that are not rotated. Exact but for a scale."""
    down, norm, up = job.sources
    key, _ = _key_value_rows(up, job.config)
    return (key * norm) @ _latent(down, job.config)


def fold_value(job: Job) -> torch.Tensor:
    """Multiply out the values. Exact but for the factor 1/rms(latent) of each token."""
    down, norm, up = job.sources
    _, value = _key_value_rows(up, job.config)
    return (value * norm) @ _latent(down, job.config)


def query_taps(job: Job) -> torch.Tensor:
    """Bring q to the recipe's rms before SiLU; the current token is the only tap."""
    input_norm, query = job.sources
    rows = _nope_rows(query, job.config) * input_norm
    return _last_tap(_row_power(rows), job.recipe.qk_rms, job)


def folded_query_taps(job: Job) -> torch.Tensor:
    """Do the same for a low-rank query, through its factors."""
    input_norm, down, norm, up = job.sources
    rows = _nope_rows(up, job.config) * norm
    return _last_tap(_folded_power(rows, down * input_norm), job.recipe.qk_rms, job)


def key_taps(job: Job) -> torch.Tensor:
    """Bring k to the recipe's rms before SiLU; the current token is the only tap."""
    input_norm, down, norm, up = job.sources
    key, _ = _key_value_rows(up, job.config)
    latent = _latent(down, job.config) * input_norm
    return _last_tap(_folded_power(key * norm, latent), job.recipe.qk_rms, job)


def value_taps(job: Job) -> torch.Tensor:
    """Bring v to the recipe's rms before SiLU; the current token is the only tap."""
    input_norm, down, norm, up = job.sources
    _, value = _key_value_rows(up, job.config)
    latent = _latent(down, job.config) * input_norm
    return _last_tap(_folded_power(value * norm, latent), job.recipe.v_rms, job)


def scale_output(job: Job) -> torch.Tensor:
    """Give o_proj's columns the size that the teacher's values have in each head.

    KDA's output norm makes every head's output of unit rms; the teacher's values have an rms of
    their own per head, which would be lost.
    """
    output, input_norm, down, norm, up = job.sources
    _, value = _key_value_rows(up, job.config)
    latent = _latent(down, job.config) * input_norm
    # A latent without power gives values without power: 0 over any positive number.
    latent_power = _row_power(latent).mean().clamp_min(_TINY)
    power = _folded_power(value * norm, latent) / latent_power
    rms = _per_head(power, job.config.mla.num_heads).sqrt()  # [H]
    return output.mul_(rms.repeat_interleave(job.config.mla.v_head_dim))


def decay_rate(job: Job) -> torch.Tensor:
    """Return A_log: the log of the middle rate, the same for every head."""
    return _log_rates(job).mean().expand(job.shape).clone()


def decay_bias(job: Job) -> torch.Tensor:
    """Return dt_bias: half-lives spread evenly in log over the key channels of every head.

    Inverts g = -exp(A_log) softplus(dt_bias) at g = -ln 2 / half-life (natural log, per token).
    """
    log_rates = _log_rates(job)
    steps = (log_rates - log_rates.mean()).exp()
    # softplus^-1(y) = y + log(1 - exp(-y)), which does not overflow for large y.
    bias = steps + torch.log(-torch.expm1(-steps))
    return bias.repeat(job.config.mla.num_heads)


def bounded_bias(job: Job) -> torch.Tensor:
    """Return dt_bias for the bounded decay: the same half-lives as `decay_bias`, as far as it goes.

    Inverts g = L sigmoid(exp(A_log) dt_bias) with A_log 0 and L = -5.
    """
    shares = _log_rates(job).exp() / -LOWER_BOUND
    return shares.clamp_max(_MOST_OF_BOUND).logit().repeat(job.config.mla.num_heads)


def double(job: Job) -> torch.Tensor:
    """Return twice the source."""
    return 2 * job.sources[0]


def random(job: Job) -> torch.Tensor:
    """Draw normal weights, seeded by the recipe and the parameter's name, so order is free."""
    seed = hashlib.sha256(f"{job.recipe.seed}:{job.target}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)
    return torch.randn(job.shape, generator=generator) * job.config.initializer_range


def zeros(job: Job) -> torch.Tensor:
    """Return zeros: a gate at its middle, a constant decay, a bias without effect."""
    return torch.zeros(job.shape)


def output_gain(job: Job) -> torch.Tensor:
    """Return o_norm's weight: the recipe's scale, doubled since the gate starts at 1/2."""
    return torch.full(job.shape, 2 * job.recipe.output_scale)


TRANSFORMS: Mapping[Op, Callable[[Job], torch.Tensor]] = {
    Op.KEEP_QUERY: keep_query,
    Op.TAKE_QUERY: take_query,
    Op.FOLD_QUERY: fold_query,
    Op.FOLD_KEY: fold_key,
    Op.FOLD_VALUE: fold_value,
    Op.QUERY_TAPS: query_taps,
    Op.FOLDED_QUERY_TAPS: folded_query_taps,
    Op.KEY_TAPS: key_taps,
    Op.VALUE_TAPS: value_taps,
    Op.SCALE_OUTPUT: scale_output,
    Op.DECAY_RATE: decay_rate,
    Op.DECAY_BIAS: decay_bias,
    Op.BOUNDED_BIAS: bounded_bias,
    Op.DOUBLE: double,
    Op.RANDOM: random,
    Op.ZEROS: zeros,
    Op.OUTPUT_GAIN: output_gain,
}


def _nope_rows(query: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return the rows of q that are not rotated: [H * qk_nope_head_dim, in]."""
    heads = _by_head(query, config.mla.num_heads)
    return heads[:, : config.mla.qk_nope_head_dim].flatten(0, 1)


def _key_value_rows(up: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Split kv_b, whose heads each hold their key rows, then their value rows."""
    heads = _by_head(up, config.mla.num_heads)
    key_rows = config.mla.qk_nope_head_dim
    return heads[:, :key_rows].flatten(0, 1), heads[:, key_rows:].flatten(0, 1)


def _by_head(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the rows of each head apart: [H, rows of a head, ...]."""
    return rows.reshape(num_heads, rows.shape[0] // num_heads, *rows.shape[1:])


def _latent(down: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return the rows of kv_a that make the latent; the shared rotated key follows them."""
    return down[: config.mla.kv_lora_rank]


def _row_power(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(-1)


def _folded_power(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return the row power of up @ down through down's Gram matrix, without the product."""
    return ((up @ (down @ down.T)) * up).sum(-1).clamp_min(0)


def _per_head(power: torch.Tensor, num_heads: int) -> torch.Tensor:
    return _by_head(power, num_heads).mean(-1)


def _last_tap(power: torch.Tensor, rms: float, job: Job) -> torch.Tensor:
    """Return taps [P, 1, W] that are 0 but for the last, which gives each head the rms."""
    per_head = _per_head(power, job.config.mla.num_heads)
    # No gain gives a head without power, as in a pruned layer, an rms: it passes its input on.
    gain = torch.where(per_head > _TINY, rms / per_head.clamp_min(_TINY).sqrt(), 1.0)
    taps = torch.zeros(job.shape)
    taps[:, 0, -1] = gain.repeat_interleave(job.shape[0] // job.config.mla.num_heads)
    return taps


def _log_rates(job: Job) -> torch.Tensor:
    """Return ln(ln 2 / half-life) of every key channel of a head: [K]."""
    shortest, longest = job.recipe.half_life_tokens
    num_channels = job.config.mla.qk_nope_head_dim
    log_half_lives = torch.linspace(
        math.log(shortest), math.log(longest), num_channels, dtype=torch.float64
    )
    return math.log(math.log(2)) - log_half_lives
