"""Where a library's model is listened to: modules under the names of the released checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kimi_convert.validation.parity.stages import HIDDEN, Probe

# Path of a module in a layer -> stages that it takes in and gives out; empty for no stage.
Stages = Mapping[str, tuple[str, str]]
OF_LAYER: Stages = {
    "input_layernorm": ("", "input_norm"),
    "post_attention_layernorm": ("", "mlp_norm"),
    "mlp": ("", "feed_forward"),
    "mlp.shared_experts": ("", "moe.shared"),
    "": ("", HIDDEN),
}
OF_KDA: Stages = {
    "self_attn.q_proj": ("", "kda.q"),
    "self_attn.k_proj": ("", "kda.k"),
    "self_attn.v_proj": ("", "kda.v"),
    "self_attn.b_proj": ("", "kda.b"),
    "self_attn.g_b_proj": ("", "kda.g"),
    "self_attn.o_norm": ("kda.recurrence", ""),
    "self_attn.o_proj": ("kda.o_norm", "kda.o"),
}
OF_MLA: Stages = {
    "self_attn.q_proj": ("", "mla.q"),
    "self_attn.kv_a_proj_with_mqa": ("", "mla.kv_a"),
    "self_attn.kv_a_layernorm": ("", "mla.kv_a_norm"),
    "self_attn.o_proj": ("mla.attention", "mla.o"),
}


class Heard(NamedTuple):
    """A module, and what is kept of it."""

    module: Any  # each library has its own kind
    taken: Probe | None
    given: Probe | None


def heard_in(layer: object, layer_idx: int, stages: Stages) -> Iterator[Heard]:
    """Yield the modules that a layer has of those that are listened to."""
    for path, (taken, given) in stages.items():
        module = module_at(layer, path)
        if module is not None:
            probes = (Probe(layer_idx, stage) if stage else None for stage in (taken, given))
            yield Heard(module, *probes)


def module_at(layer: object, path: str) -> Any:  # noqa: ANN401  (each library has its own kind)
    """Return a part of a layer by its dotted path, or None where it has no such part."""
    part = layer
    for name in filter(None, path.split(".")):
        part = getattr(part, name, None)
    return part
