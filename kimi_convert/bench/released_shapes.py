"""Right-shaped checkpoints of released models, without their weights: names, shapes, dtypes, files.

Headers are real and weights are holes that read as zeros, or where asked for real bytes. So what a
conversion does with a model of a terabyte can be measured on a laptop's disk.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from kimi_convert.checkpoints.mapping import Entry, Storage
from kimi_convert.checkpoints.shard_plan import PlannedTensor, ShardPlan, plan_shards
from kimi_convert.checkpoints.weight_map import INDEX_FILE
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import CONFIG_FILE, parse_config
from kimi_convert.config.quantization import FP8_SCALE_SUFFIX, FP8_TILE, fp8_quantization
from kimi_convert.model.names.layout import expected_entries

SHARD_BYTES = 5 * 10**9
_BLOCK_BYTES = 8 * 2**20

_SHARED: Mapping[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}
_LARGE: Mapping[str, object] = {
    **_SHARED,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "quantization_config": fp8_quantization(),
    "rms_norm_eps": 1e-06,
}
_YARN = {
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}

# The config.json of each released model, without its code references.
MODELS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        # https://huggingface.co/moonshotai/Moonlight-16B-A3B
        "moonlight": {
            **_SHARED,
            "bos_token_id": 163584,
            "eos_token_id": 163586,
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 11264,
            "max_position_embeddings": 8192,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "rms_norm_eps": 1e-05,
            "rope_theta": 50000.0,
            "routed_scaling_factor": 2.446,
            "topk_group": 1,
            "vocab_size": 163840,
        },
        # https://huggingface.co/deepseek-ai/DeepSeek-V3, without its MTP layer
        "deepseek-v3": {
            **_LARGE,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "first_k_dense_replace": 3,
            "max_position_embeddings": 163840,
            "model_type": "deepseek_v3",
            "n_group": 8,
            "n_routed_experts": 256,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "rope_scaling": {**_YARN, "beta_fast": 32, "factor": 40},
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "topk_group": 4,
            "vocab_size": 129280,
        },
        # https://huggingface.co/moonshotai/Kimi-K2-Instruct
        "kimi-k2": {
            **_LARGE,
            "bos_token_id": 163584,
            "eos_token_id": 163585,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 131072,
            "model_type": "kimi_k2",
            "n_group": 1,
            "n_routed_experts": 384,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "rope_scaling": {**_YARN, "beta_fast": 1.0, "factor": 32.0},
            "rope_theta": 50000.0,
            "routed_scaling_factor": 2.827,
            "topk_group": 1,
            "vocab_size": 163840,
        },
    }
)

# Stored plain where a checkpoint is in FP8; vectors are too.
_NOT_QUANTISED = frozenset({"embed.weight", "head.weight", "layers.{layer}.moe.router.weight"})
_INVERSE_FREQUENCIES = "model.layers.{layer}.self_attn.rotary_emb.inv_freq"


def write_shaped_checkpoint(
    folder: Path,
    document: Mapping[str, object],
    *,
    filled_bytes: int = 0,
    shard_bytes: int = SHARD_BYTES,
    files: ShardPlan | None = None,
) -> Path:
    """Write a checkpoint of a config into a new folder; return the folder.

    Args:
        folder: must not exist.
        document: config.json.
        filled_bytes: how many bytes from the start of the files are real; the rest are holes.
        shard_bytes: of each file at most.
        files: which tensors lie in which file, where not simply in order.

    Raises:
        ConfigError: the config is not valid.
    """
    config = parse_config(document)
    plan = files or plan_shards(shaped_tensors(config), shard_bytes)
    folder.mkdir()
    for shard in plan.shards:
        with (folder / shard.file_name).open("xb") as file:
            file.write(shard.header())
            for tensor in shard.tensors:
                if filled_bytes > 0:
                    _fill(file.write, tensor)
                    filled_bytes -= tensor.nbytes
            file.truncate(shard.file_bytes)
            file.flush()
            os.fsync(file.fileno())
    (folder / INDEX_FILE).write_bytes(plan.index_json())
    (folder / CONFIG_FILE).write_text(json.dumps(dict(document)), encoding="utf-8")
    return folder


def shaped_tensors(config: ModelConfig) -> Iterator[PlannedTensor]:
    """Give every tensor that such a checkpoint holds, FP8 scales and leftovers included."""
    for entry in expected_entries(config):
        if config.quantization is None or not _is_quantised(entry):
            yield PlannedTensor(entry.name, _dtype(config, entry), entry.shape)
            continue
        rows, columns = entry.shape
        yield PlannedTensor(entry.name, "F8_E4M3", entry.shape)
        scales = (-(-rows // FP8_TILE), -(-columns // FP8_TILE))
        yield PlannedTensor(entry.name + FP8_SCALE_SUFFIX, "F32", scales)
    if config.model_type == "kimi_k2":  # left there by its exporter, in every layer
        for layer_idx in range(config.num_layers):
            name = _INVERSE_FREQUENCIES.format(layer=layer_idx)
            yield PlannedTensor(name, "BF16", (56,))


def _is_quantised(entry: Entry) -> bool:
    return len(entry.shape) == 2 and entry.template not in _NOT_QUANTISED


def _dtype(config: ModelConfig, entry: Entry) -> str:
    biased = entry.template.endswith("router.bias") and config.quantization is not None
    return "F32" if biased or entry.storage is Storage.FP32 else "BF16"


def _fill(write: Callable[[bytes | memoryview], object], tensor: PlannedTensor) -> None:
    """Write a tensor's bytes from one block of them, over and over."""
    block = memoryview(_block(tensor.dtype))
    for at in range(0, tensor.nbytes, len(block)):
        write(block[: tensor.nbytes - at])


@cache
def _block(dtype: str) -> bytes:
    """Return finite values of a dtype: bf16 of size 2^-7 to 2^-3, any e4m3, scales of 2^-11."""
    if dtype == "F32":
        return struct.pack("<f", 2.0**-11) * (_BLOCK_BYTES // 4)
    noise = random.Random(0).randbytes(_BLOCK_BYTES)  # noqa: S311  (data, not a secret)
    if dtype == "F8_E4M3":
        return noise.translate(bytes(b & 0x80 if b & 0x7F == 0x7F else b for b in range(256)))
    assert dtype == "BF16"
    block = bytearray(noise)
    block[1::2] = noise[1::2].translate(bytes(0x3C + (b & 1) | b & 0x80 for b in range(256)))
    return bytes(block)
