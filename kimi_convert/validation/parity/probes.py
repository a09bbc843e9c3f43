"""Listen to the parts of one layer of our reference models while it runs.

What a fused kernel never forms (the convolved q, k and v, the log decay) is computed here a second
time from what its projections gave and the layer's own parameters: a wrong parameter shows there,
a wrong kernel one stage later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from kimi_convert.kernels.short_conv import short_conv
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.kda import KimiDeltaAttention
from kimi_convert.model.moe import Router, Routing
from kimi_convert.validation.parity.oracles.hearing import module_at
from kimi_convert.validation.parity.stages import ROUTER, SCORES

# Path of a module in a layer -> stages that it takes in and gives out; empty for no stage.
_MODULES: Mapping[str, tuple[str, str]] = {
    "input_norm": ("", "input_norm"),
    "kda.q": ("", "kda.q"),
    "kda.k": ("", "kda.k"),
    "kda.v": ("", "kda.v"),
    "kda.f_b": ("", "kda.f"),
    "kda.b": ("", "kda.b"),
    "kda.g_b": ("", "kda.g"),
    "kda.o_norm": ("kda.recurrence", ""),
    "kda.o": ("kda.o_norm", "kda.o"),
    "mla.q_a": ("", "mla.q_a"),
    "mla.q_a_norm": ("", "mla.q_a_norm"),
    "mla.q_b": ("", "mla.q"),
    "mla.q": ("", "mla.q"),
    "mla.kv_a": ("", "mla.kv_a"),
    "mla.kv_a_norm": ("", "mla.kv_a_norm"),
    "mla.o": ("mla.attention", "mla.o"),
    "mlp_norm": ("", "mlp_norm"),
    "moe.router": ("", ""),
    "moe.experts": ("", "moe.experts"),
    "moe.shared": ("", "moe.shared"),
    "moe": ("", "feed_forward"),
    "mlp": ("", "feed_forward"),
}
_CONVOLUTIONS = ("q", "k", "v")


@contextmanager
def listening(layer: DecoderLayer) -> Generator[Callable[[int], dict[str, torch.Tensor]]]:
    """Collect the stages of a layer while it runs, in one piece or in several.

    Yields:
        A function from the number of tokens in a sequence to values [B, T, ...] by stage, of every
        stage that all of them went through.
    """
    pieces: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    with ExitStack() as stack:
        for path, (taken, given) in _MODULES.items():
            module = module_at(layer, path)
            if module is not None:
                hook = module.register_forward_hook(_recorder(pieces, taken, given))
                stack.callback(hook.remove)
        yield lambda num_tokens: _collected(layer, pieces, num_tokens)


def expert_weights(routing: Routing, num_experts: int) -> torch.Tensor:
    """Return the factor on every expert's output [N, E], 0 where it was not chosen."""
    weights = routing.weights
    return weights.new_zeros(len(weights), num_experts).scatter(1, routing.experts, weights)


def _recorder(
    pieces: defaultdict[str, list[torch.Tensor]], taken: str, given: str
) -> Callable[..., None]:
    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...], found: object) -> None:
        if taken:
            pieces[taken].append(inputs[0])
        if isinstance(module, Router):
            assert isinstance(found, Routing)
            pieces[SCORES].append(module.scores(inputs[0])[1])
            pieces[ROUTER].append(expert_weights(found, len(module.weight)))
        elif given:
            assert isinstance(found, torch.Tensor)
            pieces[given].append(found)

    return record


def _collected(
    layer: DecoderLayer, pieces: Mapping[str, list[torch.Tensor]], num_tokens: int
) -> dict[str, torch.Tensor]:
    batch_size = pieces["input_norm"][0].shape[0]
    found: dict[str, torch.Tensor] = {}
    for stage, parts in pieces.items():
        # Modules that see tokens one by one have them in one axis.
        shaped = [p.reshape(batch_size, -1, *p.shape[1 if p.ndim == 2 else 2 :]) for p in parts]
        joined = torch.cat(shaped, 1)
        if joined.shape[1] == num_tokens:
            found[stage] = joined
    return found if layer.kda is None else found | _fused(layer.kda, found)


def _fused(kda: KimiDeltaAttention, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for name in _CONVOLUTIONS:
        weight = kda.get_submodule(f"{name}_conv").weight
        assert isinstance(weight, torch.Tensor)
        made[f"kda.{name}_conv"], _ = short_conv(found[f"kda.{name}"], weight)
    f = found["kda.f"].unflatten(-1, (kda.num_heads, -1))  # [B, T, H, K]
    return made | {"kda.decay": kda.gate_law().log_decay(f)}
