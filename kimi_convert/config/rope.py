"""Rotary position embedding in config.json: `rope_theta` with `rope_scaling`, or `rope_parameters`."""

from __future__ import annotations

from kimi_convert.config.architecture import RopeConfig, YarnConfig
from kimi_convert.config.fields import Fields
from kimi_convert.errors import ConfigError

_DEFAULT_THETA = 10000.0


def parse_rope(fields: Fields) -> RopeConfig:
    """Read theta, the pairing of dimensions and YaRN, in the old or the new spelling.

    Raises:
        ConfigError: both spellings are present and differ, or the scaling is of an unknown type.
    """
    theta = fields.number("rope_theta", default=-1.0)
    old = _parse_scaling(fields.nested("rope_scaling"), fallback=None)
    parameters = fields.nested("rope_parameters")
    new_theta = parameters.number("rope_theta", default=-1.0) if parameters else -1.0
    new = _parse_scaling(parameters, fallback=old)
    if theta >= 0 and new_theta >= 0 and theta != new_theta:
        raise ConfigError(
            "config fields 'rope_theta' and 'rope_parameters.rope_theta' contradict each other",
            found=f"{theta} and {new_theta}",
        )
    if old is not None and parameters is not None and old != new:
        raise ConfigError(
            "config fields 'rope_scaling' and 'rope_parameters' contradict each other",
            found=f"{old} and {new}",
        )
    stated = max(theta, new_theta)
    return RopeConfig(
        theta=_DEFAULT_THETA if stated < 0 else stated,
        interleaved=fields.boolean("rope_interleave", default=True),
        yarn=new,
    )


def rope_to_json(rope: RopeConfig | None) -> dict[str, object]:
    """Spell rotary embedding in the old form, which every loader reads."""
    if rope is None:
        return {}
    document: dict[str, object] = {"rope_theta": rope.theta, "rope_scaling": None}
    if not rope.interleaved:
        document["rope_interleave"] = False
    if rope.yarn is not None:
        document["rope_scaling"] = {
            "type": "yarn",
            "factor": rope.yarn.factor,
            "original_max_position_embeddings": rope.yarn.original_max_positions,
            "beta_fast": rope.yarn.beta_fast,
            "beta_slow": rope.yarn.beta_slow,
            "mscale": rope.yarn.mscale,
            "mscale_all_dim": rope.yarn.mscale_all_dim,
        }
    return document


def _parse_scaling(scaling: Fields | None, fallback: YarnConfig | None) -> YarnConfig | None:
    if scaling is None:
        return fallback
    kind = scaling.text("rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(
            "config field 'rope_scaling' has a type that is not supported",
            expected="yarn, default or null",
            found=repr(kind),
        )
    yarn = YarnConfig(
        factor=scaling.number("factor"),
        original_max_positions=scaling.integer("original_max_position_embeddings"),
        beta_fast=scaling.number("beta_fast", default=32.0),
        beta_slow=scaling.number("beta_slow", default=1.0),
        mscale=scaling.number("mscale", default=1.0),
        mscale_all_dim=scaling.number("mscale_all_dim", default=0.0),
    )
    scaling.number("rope_theta", default=0.0)  # read beside the scaling by `parse_rope`
    scaling.refuse_rest()
    return yarn
