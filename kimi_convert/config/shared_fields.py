"""The fields of config.json that DeepSeek and Kimi-Linear spell alike, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypedDict

from kimi_convert.config.architecture import (
    MlaConfig,
    ModelConfig,
    RopeConfig,
    Scoring,
    TopkMethod,
)
from kimi_convert.config.fields import Fields, same
from kimi_convert.config.limits import MAX_LAYERS, shown
from kimi_convert.errors import ConfigError

# What every config.json gets that says nothing else: of one value only, or inert.
_WRITTEN: Mapping[str, object] = MappingProxyType({"hidden_act": "silu", "use_cache": True})


class SharedFields(TypedDict):
    """Arguments of `ModelConfig` that `parse_shared` provides."""

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    intermediate_size: int
    rms_norm_eps: float
    max_positions: int
    num_mtp_layers: int
    tie_word_embeddings: bool
    dtype: str
    initializer_range: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    quantization: Mapping[str, object] | None


def parse_shared(fields: Fields, model_type: str) -> SharedFields:
    """Read sizes, tokens and dtypes; refuse switches that change the maths."""
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False, None)
    fields.expect("mlp_bias", False, None)
    return SharedFields(
        model_type=model_type,
        hidden_size=fields.integer("hidden_size"),
        num_layers=fields.integer("num_hidden_layers", least=1, most=MAX_LAYERS),
        vocab_size=fields.integer("vocab_size"),
        intermediate_size=fields.integer("intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_positions=fields.integer("max_position_embeddings", "model_max_length", default=4096),
        num_mtp_layers=fields.integer("num_nextn_predict_layers", "num_mtp_layers", default=0),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        dtype=fields.text("dtype", "torch_dtype", default="bfloat16").removeprefix("torch."),
        initializer_range=fields.number("initializer_range", default=0.02),
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=fields.integers("eos_token_id"),
        pad_token_id=fields.optional_integer("pad_token_id"),
        quantization=fields.mapping("quantization_config"),
    )


def written_fields(architecture: str) -> dict[str, object]:
    """Return the fields that a config.json gets where `ModelConfig.carried` has no other value."""
    return {"architectures": [architecture], **_WRITTEN}


def carried_fields(fields: Fields, written: Mapping[str, object]) -> dict[str, object]:
    """Return what nothing has read, without the fields that are written anyway.

    So a config equals what is read back from the config.json that it is written to.
    """
    return {
        name: value
        for name, value in fields.rest().items()
        if name not in written or not same(value, written[name])
    }


def shared_to_json(config: ModelConfig) -> dict[str, object]:
    """Spell the fields that both families share."""
    eos = config.eos_token_ids
    document: dict[str, object] = {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": config.dtype,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (list(eos) or None),
        "pad_token_id": config.pad_token_id,
        "num_attention_heads": config.mla.num_heads,
        "num_key_value_heads": config.mla.num_heads,
        "q_lora_rank": config.mla.q_lora_rank,
        "kv_lora_rank": config.mla.kv_lora_rank,
        "qk_nope_head_dim": config.mla.qk_nope_head_dim,
        "qk_rope_head_dim": config.mla.qk_rope_head_dim,
        "v_head_dim": config.mla.v_head_dim,
        "num_nextn_predict_layers": config.num_mtp_layers,
    }
    if config.quantization is not None:
        document["quantization_config"] = dict(config.quantization)
    return document


def parse_mla(fields: Fields, *, rope: RopeConfig | None, gated: bool = False) -> MlaConfig:
    """Read the sizes of multi-head latent attention; what they do not say is given.

    Raises:
        ConfigError: fewer key-value heads than query heads, which MLA does not have, or a width
            of queries that is not the sum of their parts.
    """
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_kv_heads != num_heads:
        raise ConfigError(
            "config field 'num_key_value_heads' contradicts 'num_attention_heads'",
            expected=f"{num_heads}, since MLA has one key and value per query head",
            found=num_kv_heads,
        )
    nope, rotated = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    fields.expect("qk_head_dim", nope + rotated, None)
    return MlaConfig(
        num_heads=num_heads,
        q_lora_rank=fields.optional_integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotated,
        v_head_dim=fields.integer("v_head_dim"),
        rope=rope,
        gated=gated,
    )


def parse_scoring(fields: Fields, name: str, *, default: Scoring) -> Scoring:
    """Read the router's scoring function."""
    text = fields.text(name, default=default)
    if text not in {*Scoring}:
        raise ConfigError(
            f"config field {name!r} names an unknown scoring function",
            expected=" or ".join(Scoring),
            found=shown(text),
        )
    return Scoring(text)


def parse_topk_method(fields: Fields, *, default: TopkMethod) -> TopkMethod:
    """Read how experts are chosen."""
    text = fields.text("topk_method", default=default)
    if text not in {*TopkMethod}:
        raise ConfigError(
            "config field 'topk_method' names an unknown method",
            expected=", ".join(TopkMethod),
            found=shown(text),
        )
    return TopkMethod(text)
