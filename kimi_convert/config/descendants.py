"""Hybrids of KDA that came after Kimi-Linear: recognised by config.json, and told apart from it.

Each family is a row of a table: its model types, and the fields that say what it has and plain
Kimi-Linear has not. A field counts only where it is set, so that a checkpoint is told what it
itself needs. Facts: Kimi-K3 and GLM-5.3-Flash from their configs, Ling-3.0 from its config and
transformers' BailingHybridConfig.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from kimi_convert.config.limits import MAX_LAYERS, shown
from kimi_convert.errors import ConfigError

_TEXT_CONFIG = "text_config"
_QUIET = (None, False, 0, "")  # values of a feature that is off


@dataclass(frozen=True, slots=True)
class _Feature:
    """One field, as a path through nested objects, and what it means that it is set."""

    field: str
    text: str  # may hold {value}
    value: object = None  # the only value that counts; None for any


@dataclass(frozen=True, slots=True)
class _Family:
    """One row of the table."""

    name: str
    model_types: tuple[str, ...]
    needs: tuple[str, ...]  # fields without which it is another model of the same type
    features: tuple[_Feature, ...]
    first_layer: int = 0  # what its layer lists count from


_GATE = "a forget gate that is bounded from below by {value}"
_FAMILIES = (
    _Family(
        "Kimi-K3",
        ("kimi_k3", "kimi_linear"),
        ("attn_res_block_size",),
        (
            _Feature("linear_attn_config.gate_lower_bound", _GATE),
            _Feature(
                "linear_attn_config.use_full_rank_gate", "an output gate of full rank in KDA"
            ),
            _Feature("mla_use_output_gate", "an output gate in MLA layers"),
            _Feature(
                "attn_res_block_size", "attention over residuals, in blocks of {value} layers"
            ),
            _Feature("routed_expert_hidden_size", "experts in a latent space of width {value}"),
            _Feature("hidden_act", "the SiTU activation", "situ"),
        ),
        first_layer=1,
    ),
    _Family(
        "Ling-3.0",
        ("bailing_hybrid",),
        # Ling 2.5 has the same model type and no KDA; what `convert --format bailing_hybrid` writes
        # says nothing of its gate, which has one form in transformers.
        ("short_conv_kernel_size", "gated_attention_proj_granularity_type"),
        (
            _Feature("kda_lower_bound", _GATE),
            _Feature("no_kda_lora", "a forget gate and an output gate of full rank in KDA"),
            _Feature("gated_attention_proj_granularity_type", "a {value} gate in MLA layers"),
            _Feature("rope_theta", "MLA layers that rotate (RoPE, theta {value})"),
        ),
    ),
    _Family(
        "GLM-5.3",
        ("glm5_next", "glm5_next_text"),
        ("linear_attn_config",),
        (
            _Feature("linear_attn_config.gate_lower_bound", _GATE),
            _Feature("hc_mult", "hyper-connections of {value} residual streams"),
            _Feature("index_topk", "an indexer that lets MLA layers see {value} tokens"),
            _Feature("swiglu_limit", "SwiGLU clamped at {value}"),
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descendant:
    """What a config.json says of a descendant of Kimi-Linear."""

    family: str
    model_type: str
    num_layers: int
    kda_layers: tuple[int, ...]  # counted from 0
    sizes: Mapping[str, int]  # as config.json names them, those that are there
    features: tuple[str, ...]  # what plain Kimi-Linear has not

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return {
            "family": self.family,
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "kda_layers": list(self.kda_layers),
            "sizes": dict(self.sizes),
            "not_supported": list(self.features),
        }


_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "kv_lora_rank",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "num_experts_per_token",
    "vocab_size",
)


def recognise_descendant(document: Mapping[str, object]) -> Descendant | None:
    """Return what a config.json says, or None where it is no descendant's."""
    inner = _object(document.get(_TEXT_CONFIG))
    text = document if inner is None else inner
    for family in _FAMILIES:
        types = (document.get("model_type"), text.get("model_type"))
        if not any(name in types for name in family.model_types):
            continue
        if any(_field(text, name) in _QUIET for name in family.needs):
            continue
        return _describe(family, text, str(document.get("model_type")))
    return None


def refuse_descendant(document: Mapping[str, object], *, where: object) -> None:
    """Refuse a descendant, by the features that are not supported.

    Raises:
        ConfigError: it is one.
    """
    found = recognise_descendant(document)
    if found is not None:
        raise ConfigError(
            f"{found.family} is a hybrid with KDA layers that is not supported yet",
            where=where,
            expected="Kimi-Linear as released, or a full-attention MLA model",
            found="; ".join(found.features) or found.model_type,
            hint="`kimi-convert inspect` tells what it is.",
        )


def _describe(family: _Family, text: Mapping[str, object], model_type: str) -> Descendant:
    stated = _integer(text.get("num_hidden_layers")) or 0
    num_layers = max(0, min(stated, MAX_LAYERS))
    features = tuple(
        feature.text.format(value=shown(value).strip("'"))
        for feature in family.features
        if (value := _field(text, feature.field)) not in _QUIET and feature.value in (None, value)
    )
    return Descendant(
        family=family.name,
        model_type=model_type,
        num_layers=num_layers,
        kda_layers=_kda_layers(family, text, num_layers),
        sizes={name: size for name in _SIZES if (size := _integer(text.get(name))) is not None},
        features=features,
    )


def _kda_layers(family: _Family, text: Mapping[str, object], num_layers: int) -> tuple[int, ...]:
    listed = _field(text, "linear_attn_config.kda_layers")
    if isinstance(listed, list):
        layers = [_integer(item) for item in cast("Sequence[object]", listed)[:MAX_LAYERS]]
        return tuple(sorted(n - family.first_layer for n in layers if n is not None))
    group = _integer(text.get("layer_group_size"))
    if not group or group < 1:
        return ()
    # The last layer of each group has full attention.
    return tuple(n for n in range(num_layers) if n % group != group - 1)


def _field(document: Mapping[str, object], path: str) -> object:
    value: object = document
    for name in path.split("."):
        inner = _object(value)
        value = None if inner is None else inner.get(name)
    return value


def _object(value: object) -> Mapping[str, object] | None:
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
