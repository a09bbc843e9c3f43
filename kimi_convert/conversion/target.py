"""The config of the hybrid that a source becomes, and what cannot become one."""

from __future__ import annotations

from dataclasses import replace

from kimi_convert.config.architecture import (
    KdaConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    Scoring,
    TopkMethod,
)
from kimi_convert.config.bailing_hybrid import LOWER_BOUND
from kimi_convert.config.deepseek import SOURCE_TYPES
from kimi_convert.config.output_format import AS_SOURCE, MtpLayers, OutputFormat, TargetDtype
from kimi_convert.config.quantization import fp8_quantization
from kimi_convert.config.recipe import Recipe
from kimi_convert.config.target_format import TargetFormat
from kimi_convert.errors import ConfigError, RecipeError


def target_config(
    source: ModelConfig, recipe: Recipe, output_format: OutputFormat = AS_SOURCE
) -> ModelConfig:
    """Return the hybrid's config. KDA takes as many heads as MLA had, as wide as its values.

    Raises:
        ConfigError: the source is a hybrid already, or has heads, routing or a rotation that the
            format cannot hold.
        RecipeError: the recipe keeps layers that the source does not have, or keeps all.
    """
    _check_convertible(source)
    _check_format(source, recipe.output_format)
    _check_storage(recipe, output_format)
    mla = source.mla
    kept = set(recipe.kept_layers(source.num_layers))
    kda_layers = tuple(i for i in range(source.num_layers) if i not in kept)
    if not kda_layers:
        raise RecipeError(
            "recipe leaves no layer to convert",
            expected="at least one layer that is not kept",
            found=f"{source.num_layers} layers, all kept",
            hint="List fewer layers under `layers.keep`.",
        )
    kept_mtp = output_format.mtp is MtpLayers.KEEP
    return ModelConfig(
        num_mtp_layers=source.num_mtp_layers if kept_mtp else 0,
        quantization=_quantization(source, output_format),
        model_type=recipe.output_format,
        hidden_size=source.hidden_size,
        num_layers=source.num_layers,
        vocab_size=source.vocab_size,
        intermediate_size=source.intermediate_size,
        rms_norm_eps=source.rms_norm_eps,
        max_positions=source.max_positions,
        mla=_target_mla(mla, recipe.output_format),
        kda=_target_kda(mla, recipe),
        kda_layers=kda_layers,
        moe=_target_moe(source.moe),
        # transformers, vLLM, SGLang and llama.cpp tie nothing in this format: the output matrix is
        # always stored.
        tie_word_embeddings=False,
        dtype=source.dtype,
        initializer_range=source.initializer_range,
        bos_token_id=source.bos_token_id,
        eos_token_ids=source.eos_token_ids,
        pad_token_id=source.pad_token_id,
    )


def _target_mla(mla: MlaConfig, form: TargetFormat) -> MlaConfig:
    if form is TargetFormat.BAILING_HYBRID:
        return replace(mla, gated=True)
    return replace(mla, rope=None)


def _target_kda(mla: MlaConfig, recipe: Recipe) -> KdaConfig:
    ling = recipe.output_format is TargetFormat.BAILING_HYBRID
    return KdaConfig(
        num_heads=mla.num_heads,
        head_dim=mla.v_head_dim,
        conv_size=recipe.short_conv_size,
        full_rank_gates=ling,
        lower_bound=LOWER_BOUND if ling else None,
    )


def _quantization(source: ModelConfig, output_format: OutputFormat) -> dict[str, object] | None:
    if output_format.dtype is not TargetDtype.FP8:
        return None
    layers = range(source.num_layers)
    mixers = (f"model.layers.{layer_idx}.self_attn" for layer_idx in layers)
    routers = (
        f"model.layers.{layer_idx}.block_sparse_moe.gate" for layer_idx in source.moe_layers
    )
    return fp8_quantization((*mixers, *routers, "lm_head"))


def _target_moe(moe: MoeConfig | None) -> MoeConfig | None:
    """Return the routing in Kimi-Linear's terms: always with a correction bias, 0 if need be."""
    return None if moe is None else replace(moe, topk_method=TopkMethod.NOAUX_TC)


def _check_convertible(source: ModelConfig) -> None:
    if source.model_type not in SOURCE_TYPES:
        raise ConfigError(
            "this checkpoint cannot be converted",
            expected=f"full-attention MLA: {', '.join(SOURCE_TYPES)}",
            found=source.model_type,
            hint="It is a hybrid already; see `kimi-convert inspect`.",
        )
    mla = source.mla
    if mla.qk_nope_head_dim != mla.v_head_dim:
        raise ConfigError(
            "the Kimi-Linear format cannot hold these heads",
            expected="qk_nope_head_dim equal to v_head_dim",
            found=f"{mla.qk_nope_head_dim} and {mla.v_head_dim}",
        )
    if source.moe is not None and source.moe.topk_method is TopkMethod.GROUP_LIMITED_GREEDY:
        raise ConfigError(
            "the Kimi-Linear format cannot hold this routing",
            expected="topk_method noaux_tc or greedy",
            found=source.moe.topk_method,
            hint="Its loaders rank a group by its two best experts, this model by its best one.",
        )


def _check_format(source: ModelConfig, form: TargetFormat) -> None:
    """Refuse what Ling-3's config.json has no words for."""
    if form is not TargetFormat.BAILING_HYBRID:
        return
    rope, moe = source.mla.rope, source.moe
    needs = (
        (rope is not None and rope.interleaved, "a rotation of neighbouring dims", "halves"),
        (moe is None or moe.scoring is Scoring.SIGMOID, "routing by sigmoid", "softmax"),
        (moe is None or moe.layer_freq == 1, "experts in every layer that is not dense", "fewer"),
    )
    for holds, expected, found in needs:
        if not holds:
            raise ConfigError(
                f"the {form} format cannot hold this model",
                expected=expected,
                found=found,
                hint=f"Leave the format at {TargetFormat.KIMI_LINEAR}.",
            )


def _check_storage(recipe: Recipe, stored: OutputFormat) -> None:
    form, fitted = recipe.output_format, recipe.calibration
    if stored.dtype is TargetDtype.FP8 and fitted is not None and fitted.distill.trains_all:
        raise RecipeError(
            "what is trained is written in the source's dtype",
            expected="distill.parameters 'mixers' with --dtype fp8",
            found="'all'",
            hint="Train the mixers alone, or leave out --dtype.",
        )
    if form is not TargetFormat.KIMI_LINEAR and stored != AS_SOURCE:
        raise RecipeError(
            f"the {form} format is written in the source's dtype and without MTP layers",
            found=f"dtype {stored.dtype}, MTP layers {stored.mtp}",
            hint=f"Leave out one of both, or write {TargetFormat.KIMI_LINEAR}.",
        )
