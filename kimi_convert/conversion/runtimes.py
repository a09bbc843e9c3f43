"""Which runtimes load a hybrid of a given config: a table of what each one refuses.

Read from the sources of transformers 5.23 (models/kimi_linear), the released modeling_kimi.py,
vLLM (models/kimi_linear.py), SGLang (below), mlx-lm 0.32 and llama.cpp. transformers and mlx-lm
are also run by the tests.

SGLang's srt/models/kimi_linear.py gives `q_lora_rank` to its DeepSeek attention, which then holds
q_a and kv_a as one `fused_qkv_a_proj_with_mqa`; `load_weights` has no row that fills it, so
`q_a_proj` ends in a KeyError. Its `TopK` is given a correction bias and no scoring function, which
means sigmoid in srt/layers/moe/topk.py, whatever `moe_router_activation_func` says.

llama.cpp's models/kimi-linear.cpp knows leading dense layers but no frequency, and always scales
the weights of the chosen experts to a sum of 1; its converter reads `moe_intermediate_size` of
every model.

Of bailing_hybrid, transformers' models/bailing_hybrid was read and is run by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kimi_convert.config.architecture import ModelConfig, Scoring
from kimi_convert.config.bailing_hybrid import BAILING_TYPE
from kimi_convert.config.kimi_linear import TARGET_TYPE


@dataclass(frozen=True, slots=True)
class RuntimeSupport:
    """Whether one runtime loads the output, and what keeps it from that."""

    runtime: str
    loads: bool
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Return the fields."""
        return {"runtime": self.runtime, "loads": self.loads, "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True)
class _Limit:
    reason: str
    holds: Callable[[ModelConfig], bool]  # whether the config runs into it


_LOW_RANK_Q = _Limit(
    "needs a full-rank q (q_lora_rank null)", lambda config: config.mla.q_lora_rank is not None
)
_SOFTMAX_ROUTING = _Limit(
    "routes by sigmoid only, this model by softmax",
    lambda config: config.moe is not None and config.moe.scoring is Scoring.SOFTMAX,
)
_SPARSE_FREQUENCY = _Limit(
    "has no moe_layer_freq",
    lambda config: config.moe is not None and config.moe.layer_freq != 1,
)
_NO_EXPERTS = _Limit("needs a mixture of experts", lambda config: config.moe is None)
_NOT_RENORMALIZED = _Limit(
    "always scales the weights of the chosen experts to a sum of 1 (moe_renormalize true)",
    lambda config: config.moe is not None and not config.moe.renormalize,
)
_KDA_ALONE = _Limit("needs at least one MLA layer", lambda config: not config.mla_layers)

_NOT_EXAMINED = _Limit("not examined for this format", lambda _: True)

_Runtimes = tuple[tuple[str, tuple[_Limit, ...]], ...]
_KIMI_LINEAR: _Runtimes = (
    (
        "transformers (native, 5.23 and later)",
        (_SOFTMAX_ROUTING, _SPARSE_FREQUENCY, _NO_EXPERTS),
    ),
    ("transformers (released remote code)", (_LOW_RANK_Q,)),
    ("vLLM", (_LOW_RANK_Q,)),
    ("SGLang", (_LOW_RANK_Q, _SOFTMAX_ROUTING)),
    ("mlx-lm", (_LOW_RANK_Q, _NO_EXPERTS, _KDA_ALONE)),
    ("llama.cpp", (_SPARSE_FREQUENCY, _NO_EXPERTS, _NOT_RENORMALIZED)),
)
_RUNTIMES: Mapping[str, _Runtimes] = {
    TARGET_TYPE: _KIMI_LINEAR,
    BAILING_TYPE: (
        ("transformers (native, 5.23 and later)", (_LOW_RANK_Q,)),
        *((name, (_NOT_EXAMINED,)) for name in ("vLLM", "SGLang", "mlx-lm", "llama.cpp")),
    ),
}


def runtime_support(config: ModelConfig) -> tuple[RuntimeSupport, ...]:
    """Return for every runtime whether it loads a checkpoint of this config."""
    return tuple(
        RuntimeSupport(name, not reasons, reasons)
        for name, limits in _RUNTIMES[config.model_type]
        for reasons in [tuple(limit.reason for limit in limits if limit.holds(config))]
    )
