"""Which layers are KDA and which are dense, from the spellings that config.json has for it.

The released `linear_attn_config` counts layers from 1. transformers' own kimi_linear writes
`layer_types` and `mlp_layer_types`, one entry per layer. Both are checked; both must agree.
"""

from __future__ import annotations

from collections.abc import Sequence

from kimi_convert.config.fields import Fields
from kimi_convert.config.limits import shown
from kimi_convert.errors import ConfigError

_LINEAR, _FULL = "linear_attention", "full_attention"
_DENSE, _SPARSE = "dense", "sparse"


def kda_layers_of(fields: Fields, linear: Fields, num_layers: int) -> tuple[int, ...]:
    """Return the KDA layers, counted from 0.

    Args:
        fields: the whole config.
        linear: its `linear_attn_config`, whose lists count from 1.
        num_layers: how many layers there must be an entry for.

    Raises:
        ConfigError: the lists overlap, leave a layer out, count from 0, contradict `layer_types`,
            or neither spelling is present.
    """
    listed = _from_lists(
        linear.integer_list("kda_layers"), linear.integer_list("full_attn_layers"), num_layers
    )
    typed = _from_types(fields.texts("layer_types"), num_layers)
    if listed is None and typed is None:
        raise ConfigError(
            "config field 'linear_attn_config' lists no layers",
            expected="kda_layers and full_attn_layers, counted from 1",
            hint="Loaders guess different layers when the lists are missing; write them out.",
        )
    if listed is not None and typed is not None and listed != typed:
        raise ConfigError(
            "config fields 'linear_attn_config' and 'layer_types' contradict each other",
            expected=f"KDA layers {shown(_one_based(listed))} (counted from 1)",
            found=shown(_one_based(typed)),
        )
    return listed if listed is not None else typed or ()


def kda_layers_by_type(fields: Fields, num_layers: int) -> tuple[int, ...] | None:
    """Return the KDA layers, counted from 0, as `layer_types` has them; None without it.

    Raises:
        ConfigError: there is not one known type for each layer.
    """
    return _from_types(fields.texts("layer_types"), num_layers)


def leading_dense_layers(fields: Fields, num_layers: int) -> int:
    """Return how many layers before the first mixture of experts are dense.

    Raises:
        ConfigError: `mlp_layer_types` has dense layers after sparse ones, the wrong length, or
            contradicts `first_k_dense_replace`.
    """
    types = fields.texts("mlp_layer_types")
    stated = fields.optional_integer("first_k_dense_replace")
    if types is None:
        return 0 if stated is None else stated
    dense = sum(one == _DENSE for one in types)
    ordered = [_DENSE] * dense + [_SPARSE] * (len(types) - dense)
    if len(types) != num_layers or list(types) != ordered:
        raise ConfigError(
            "config field 'mlp_layer_types' is not valid",
            expected=f"{num_layers} entries, {_DENSE!r} ones first, then {_SPARSE!r}",
            found=shown(types),
        )
    if stated is not None and min(stated, num_layers) != dense:
        raise ConfigError(
            "config fields 'first_k_dense_replace' and 'mlp_layer_types' contradict each other",
            found=f"{stated} and {dense} dense layers",
        )
    return dense


def _from_lists(
    kda: Sequence[int], full: Sequence[int], num_layers: int
) -> tuple[int, ...] | None:
    if not kda and not full:
        return None
    for name, layers in (("kda_layers", kda), ("full_attn_layers", full)):
        outside = [layer for layer in layers if not 1 <= layer <= num_layers]
        if outside:
            counted = " (the lists count from 1, not from 0)" if 0 in outside else ""
            raise ConfigError(
                f"config field 'linear_attn_config.{name}' names layers that do not exist",
                expected=f"numbers from 1 to {num_layers}{counted}",
                found=shown(outside),
            )
        if len(set(layers)) != len(layers):
            raise ConfigError(
                f"config field 'linear_attn_config.{name}' names a layer twice",
                found=shown(layers),
            )
    overlap = sorted(set(kda) & set(full))
    if overlap:
        raise ConfigError(
            "config fields 'linear_attn_config.kda_layers' and 'full_attn_layers' overlap",
            found=shown(overlap),
        )
    left_out = sorted(set(range(1, num_layers + 1)) - set(kda) - set(full))
    if left_out:
        raise ConfigError(
            "config fields 'linear_attn_config.kda_layers' and 'full_attn_layers' leave layers out",
            expected=f"every layer from 1 to {num_layers} in one of them",
            found=f"nothing for {shown(left_out)}",
        )
    return tuple(sorted(layer - 1 for layer in kda))


def _from_types(types: Sequence[str] | None, num_layers: int) -> tuple[int, ...] | None:
    if types is None:
        return None
    if len(types) != num_layers or not set(types) <= {_LINEAR, _FULL}:
        raise ConfigError(
            "config field 'layer_types' is not valid",
            expected=f"{num_layers} entries, each {_LINEAR!r} or {_FULL!r}",
            found=shown(types),
        )
    return tuple(layer for layer, kind in enumerate(types) if kind == _LINEAR)


def _one_based(layers: Sequence[int]) -> list[int]:
    return [layer + 1 for layer in layers]
