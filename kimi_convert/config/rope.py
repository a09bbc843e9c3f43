"""Rotary position embedding in config.json: `rope_theta` with `rope_scaling`, or `rope_parameters`."""

from __future__ import annotations

from kimi_convert.config.architecture import RopeConfig, YarnConfig
from kimi_convert.config.fields import Fields
from kimi_convert.config.limits import shown
from kimi_convert.errors import ConfigError

_DEFAULT_THETA = 10000.0


def parse_rope(fields: Fields, *, default_theta: float = _DEFAULT_THETA) -> RopeConfig:
    """Read theta, the pairing of dimensions and YaRN, in the old or the new spelling.

    Args:
        fields: the whole config.
        default_theta: what the model type's loaders take where none is stated.

    Raises:
        ConfigError: both spellings are present and differ, or the scaling is of an unknown type.
    """
    scaling, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    return RopeConfig(
        theta=_parse_theta(fields, scaling, parameters, default=default_theta),
        interleaved=fields.boolean("rope_interleave", default=True),
        yarn=_parse_yarn(scaling, parameters),
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


def _parse_theta(
    fields: Fields, scaling: Fields | None, parameters: Fields | None, *, default: float
) -> float:
    """Read the base from the three places that may state it."""
    places = (
        ("rope_theta", fields),
        ("rope_scaling.rope_theta", scaling),
        ("rope_parameters.rope_theta", parameters),
    )
    read = ((name, place and place.optional_number("rope_theta")) for name, place in places)
    stated = [(name, theta) for name, theta in read if theta is not None]
    if not stated:
        return default
    (first, theta), *others = stated
    for name, other in others:
        if other != theta:
            raise ConfigError(
                f"config fields {first!r} and {name!r} contradict each other",
                found=f"{theta} and {other}",
            )
    return theta


def _parse_yarn(scaling: Fields | None, parameters: Fields | None) -> YarnConfig | None:
    stated = [_parse_scaling(one) for one in (scaling, parameters) if one is not None]
    if len(stated) == 2 and stated[0] != stated[1]:
        raise ConfigError(
            "config fields 'rope_scaling' and 'rope_parameters' contradict each other",
            found=f"{stated[0]} and {stated[1]}",
        )
    return stated[0] if stated else None


def _parse_scaling(scaling: Fields) -> YarnConfig | None:
    kind = scaling.text("rope_type", "type", default="default")
    if kind not in ("default", "yarn"):
        raise ConfigError(
            "config field 'rope_scaling' has a type that is not supported",
            expected="yarn, default or null",
            found=shown(kind),
        )
    yarn = None if kind == "default" else _yarn(scaling)
    scaling.refuse_rest()
    return yarn


def _yarn(scaling: Fields) -> YarnConfig:
    return YarnConfig(
        factor=scaling.number("factor"),
        original_max_positions=scaling.integer("original_max_position_embeddings"),
        beta_fast=scaling.number("beta_fast", default=32.0),
        beta_slow=scaling.number("beta_slow", default=1.0),
        mscale=scaling.number("mscale", default=1.0),
        mscale_all_dim=scaling.number("mscale_all_dim", default=0.0),
    )
