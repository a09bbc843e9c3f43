"""Tiny models for tests: checked configs, and random checkpoints by the naming tables.

Every tensor is random, norms, gates and convolutions too, so that no term of the maths can hide
behind a zero or a one. Plain torch and safetensors: nothing of the package writes a byte here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from kimi_convert.checkpoints.mapping import Entry, Storage
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import config_to_json, parse_config
from kimi_convert.model.names.layout import expected_entries

_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "vocab_size": 96,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "initializer_range": 0.02,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.5,
    "topk_group": 1,
}
_DEEPSEEK = {
    **_COMMON,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_interleave": True,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 1,
}
_BASES: dict[str, dict[str, object]] = {
    "deepseek_v2": {
        **_DEEPSEEK,
        "model_type": "deepseek_v2",
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "model_type": "deepseek_v3",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
    },
    "kimi_linear": {
        **_COMMON,
        "model_type": "kimi_linear",
        "model_max_length": 4096,
        "mla_use_nope": True,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "linear_attn_config": None,  # the released pattern, filled in for the number of layers
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_shared_experts": 1,
        "num_expert_group": 1,
        "moe_router_activation_func": "sigmoid",
        "moe_renormalize": True,
        "use_grouped_topk": True,
        "topk_method": "noaux_tc",
    },
}
_BASES["bailing_hybrid"] = {
    **_COMMON,
    "model_type": "bailing_hybrid",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
    "kda_lower_bound": -5.0,
    "layer_group_size": 4,
    "layer_types": None,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "n_group": 1,
}
del _BASES["bailing_hybrid"]["moe_layer_freq"]
_BASES["kimi_k2"] = {**_BASES["deepseek_v3"], "model_type": "kimi_k2"}


def tiny_config(kind: str, **overrides: object) -> ModelConfig:
    """Return a checked config of about a hundred thousand parameters.

    Args:
        kind: `deepseek_v2`, `deepseek_v3`, `kimi_k2`, `kimi_linear` or `bailing_hybrid`.
        **overrides: fields of config.json in that kind's spelling; others are refused.
    """
    base = _BASES[kind]
    unknown = sorted(set(overrides) - set(base))
    if unknown:
        raise KeyError(f"{kind} has no fields {unknown}; it has {sorted(base)}")
    document = {**base, **overrides}
    if kind == "kimi_linear" and document["linear_attn_config"] is None:
        num_layers = int(str(document["num_hidden_layers"]))
        document["linear_attn_config"] = linear_attn_config(num_layers)
    # Twice, so that the config equals what is read back from the config.json it is written to.
    return parse_config(config_to_json(parse_config(document)))


def linear_attn_config(
    num_layers: int,
    mla_layers: Sequence[int] | None = None,
    *,
    num_heads: int = 4,
    head_dim: int = 16,
    conv_size: int = 4,
) -> dict[str, object]:
    """Return the nested object of config.json, whose lists count from 1.

    Args:
        num_layers: how many layers the model has.
        mla_layers: the layers that are MLA, counted from 0; None for the released pattern, which
            is every fourth and the last.
        num_heads: KDA heads.
        head_dim: width of one KDA head's key and value.
        conv_size: taps of the short convolutions.
    """
    released = {i for i in range(num_layers) if i % 4 == 3 or i == num_layers - 1}
    mla = released if mla_layers is None else set(mla_layers)
    return {
        "kda_layers": [i + 1 for i in range(num_layers) if i not in mla],
        "full_attn_layers": [i + 1 for i in sorted(mla)],
        "num_heads": num_heads,
        "head_dim": head_dim,
        "short_conv_kernel_size": conv_size,
    }


def write_tiny_checkpoint(
    folder: Path, config: ModelConfig, seed: int = 0, *, num_shards: int = 2
) -> Path:
    """Write config.json, shards and index of a random model; return the folder.

    Weights have the config's dtype, and fp32 where the format asks for it. One shard is written
    without an index, as Hugging Face does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(config_to_json(config), indent=2)
    (folder / "config.json").write_text(document, encoding="utf-8")
    entries = expected_entries(config)
    tensors = random_tensors(config, seed)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    per_shard = math.ceil(len(entries) / num_shards)
    for shard in range(num_shards):
        names = [entry.name for entry in entries[shard * per_shard : (shard + 1) * per_shard]]
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({n: tensors[n] for n in names}, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return every tensor that a checkpoint of this config holds, by its name there."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.dtype)
    return {
        entry.name: _random_tensor(entry, generator).to(
            torch.float32 if entry.storage is Storage.FP32 else dtype
        )
        for entry in expected_entries(config)
    }


def _random_tensor(entry: Entry, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(entry.shape, generator=generator)
    part = entry.template.removeprefix("layers.{layer}.")
    special = _SPECIAL.get(part)
    if special is not None:
        return special(noise)
    if noise.ndim == 1:
        return 1.0 + 0.2 * noise  # every other vector is the weight of a norm
    return noise / math.sqrt(entry.shape[-1])


_SPECIAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "embed.weight": lambda noise: noise,
    "kda.q_conv.weight": lambda noise: 0.5 * noise,
    "kda.k_conv.weight": lambda noise: 0.5 * noise,
    "kda.v_conv.weight": lambda noise: 0.5 * noise,
    "kda.A_log": lambda noise: 0.7 * noise,
    # Decays exp(g) from about 0.3 to 0.99: both memory and forgetting are seen.
    "kda.dt_bias": lambda noise: noise - 2.0,
    "mla.gate.weight": lambda noise: 0.3 * noise,
    "moe.router.bias": lambda noise: 0.1 * noise,
}
