"""The models that the suite runs: each differs from the released pattern in one way."""

from __future__ import annotations

from tests.tiny import linear_attn_config, tiny_config

_OTHER_HEADS = linear_attn_config(4, [0, 2], num_heads=2, head_dim=24)
MODELS = {
    "released-pattern": ("kimi_linear", {}),
    "low-rank-q": ("kimi_linear", {"q_lora_rank": 20}),
    "five-layers": ("kimi_linear", {"num_hidden_layers": 5}),
    "two-dense-layers": ("kimi_linear", {"first_k_dense_replace": 2}),
    "mla-first-other-heads": ("kimi_linear", {"linear_attn_config": _OTHER_HEADS}),
    "kda-only": ("kimi_linear", {"linear_attn_config": linear_attn_config(4, [])}),
    "conv-of-two": (
        "kimi_linear",
        {"linear_attn_config": linear_attn_config(4, [3], conv_size=2)},
    ),
    "groups-of-experts": ("kimi_linear", {"num_expert_group": 4, "topk_group": 2}),
    "no-shared-expert": ("kimi_linear", {"num_shared_experts": 0}),
    "tied-head": ("kimi_linear", {"tie_word_embeddings": True}),
    "eps-1e-3": ("kimi_linear", {"rms_norm_eps": 1e-3}),
    "teacher-v3": ("deepseek_v3", {}),
    "teacher-v2": ("deepseek_v2", {}),
}


def model(name, **more):
    kind, fields = MODELS[name]
    return tiny_config(kind, **fields, **more)
