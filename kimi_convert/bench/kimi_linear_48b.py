"""The config.json of Kimi-Linear-48B-A3B, with as many layers as a measurement has room for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

RELEASED_LAYERS = 27

# config.json of https://huggingface.co/moonshotai/Kimi-Linear-48B-A3B-Instruct, without its code
# references and its layer lists, which `kimi_linear_document` makes: every fourth layer and the last are MLA.
_RELEASED: Mapping[str, object] = MappingProxyType(
    {
        "architectures": ["KimiLinearForCausalLM"],
        "bos_token_id": 163584,
        "dtype": "bfloat16",
        "eos_token_id": 163586,
        "first_k_dense_replace": 1,
        "head_dim": 72,
        "hidden_act": "silu",
        "hidden_size": 2304,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "kv_lora_rank": 512,
        "mla_use_nope": True,
        "model_max_length": 1048576,
        "model_type": "kimi_linear",
        "moe_intermediate_size": 1024,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_attention_heads": 32,
        "num_expert_group": 1,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_key_value_heads": 32,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "pad_token_id": 163839,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.446,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_grouped_topk": True,
        "v_head_dim": 128,
        "vocab_size": 163840,
    }
)


def kimi_linear_document(num_layers: int) -> dict[str, object]:
    """Return config.json with three KDA layers to one MLA layer, the last one MLA."""
    mla = [n for n in range(1, num_layers + 1) if n % 4 == 0 or n == num_layers]
    lists = {
        "full_attn_layers": mla,
        "kda_layers": [n for n in range(1, num_layers + 1) if n not in mla],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    }
    return {**_RELEASED, "num_hidden_layers": num_layers, "linear_attn_config": lists}
