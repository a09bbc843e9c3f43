"""mlx-lm's kimi_linear on the CPU, in fp32. It refuses code from a checkpoint by itself."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from kimi_convert.validation.parity.oracles.hearing import (
    OF_KDA,
    OF_LAYER,
    OF_MLA,
    Heard,
    Stages,
    heard_in,
)
from kimi_convert.validation.parity.oracles.process import DECODE, OracleRequest, answer_request
from kimi_convert.validation.parity.stages import (
    EMBED_PROBE,
    LATENTS,
    LOGITS_PROBE,
    ROUTER,
    SCORES,
    STATE,
    Probe,
)
from kimi_convert.validation.parity.trace import Greedy, Trace

_CHOSEN, _ROUTER_LOGITS = "chosen", "router logits"  # stages that become SCORES and ROUTER
_OF_BOTH: Stages = {
    **OF_LAYER,
    "mlp.gate": ("", _ROUTER_LOGITS),
    "mlp.switch_mlp": (_CHOSEN, ""),
}
_OF_KDA: Stages = {**_OF_BOTH, **OF_KDA, "self_attn.f_b_proj": ("", "kda.f")}
_OF_MLA: Stages = {**_OF_BOTH, **OF_MLA}
_Pieces = defaultdict[Probe, list[mx.array]]


def trace_with_mlx(request: OracleRequest) -> dict[str, Trace]:
    """Run a request."""
    mx.set_default_device(mx.cpu)
    model = load(request.folder)
    greedy = _continue(model, request)
    return {
        form: Trace(trace_model(model, request.token_ids, decode=form == DECODE), greedy)
        for form in request.forms
    }


def load(folder: str) -> Any:  # noqa: ANN401  (mlx-lm's models have no type)
    """Load a checkpoint in fp32."""
    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    return model


def trace_model(
    model: Any,  # noqa: ANN401
    tokens: torch.Tensor,
    *,
    decode: bool = False,
) -> dict[Probe, torch.Tensor]:
    """Run tokens [B, T] through a loaded model and return its values by probe."""
    pieces: _Pieces = defaultdict(list)
    cache = make_prompt_cache(model)
    parts = tokens.split(1 if decode else tokens.shape[1], 1)
    with _listening(_modules(model), pieces):
        logits = [_as_torch(model(mx.array(part.numpy()), cache)) for part in parts]
    values = {probe: torch.cat([_as_torch(x) for x in xs], 1) for probe, xs in pieces.items()}
    for layer_idx, layer in enumerate(model.layers):
        chosen = values.pop(Probe(layer_idx, _CHOSEN), None)
        scored = values.pop(Probe(layer_idx, _ROUTER_LOGITS), None)
        if chosen is not None and scored is not None:
            values |= _routing(layer, layer_idx, chosen=chosen.long(), logits=scored)
        if layer.is_linear:
            values |= _recomputed(layer.self_attn, layer_idx, values)
            state = _as_torch(cache[layer_idx][3])  # [B, H, V, K]
            values[Probe(layer_idx, STATE)] = state.transpose(-1, -2)
        else:
            kept = cache[layer_idx]
            latent, key = (_as_torch(x)[:, 0, : kept.offset] for x in (kept.keys, kept.values))
            values[Probe(layer_idx, LATENTS)] = torch.cat((latent, key), -1)
    return values | {LOGITS_PROBE: torch.cat(logits, 1)}


def _modules(model: Any) -> list[Heard]:  # noqa: ANN401
    found = [Heard(model.model.embed_tokens, None, EMBED_PROBE)]
    for layer_idx, layer in enumerate(model.layers):
        found += heard_in(layer, layer_idx, _OF_KDA if layer.is_linear else _OF_MLA)
    return found


@contextmanager
def _listening(modules: list[Heard], pieces: _Pieces) -> Generator[None]:
    """Keep what goes in and out of modules: mlx has no hooks, so their classes are changed."""
    probes = {id(module): (taken, given) for module, taken, given in modules}
    calls = {type(module): type(module).__call__ for module, _, _ in modules}

    def heard(call: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def listen(module: Any, *inputs: mx.array, **named: Any) -> mx.array:  # noqa: ANN401
            found = call(module, *inputs, **named)
            taken, given = probes.get(id(module), (None, None))
            for probe, value in ((taken, inputs[-1]), (given, found)):
                if probe is not None:
                    pieces[probe].append(value)
            return found

        return listen

    for cls, call in calls.items():
        cls.__call__ = heard(call)
    try:
        yield
    finally:
        for cls, call in calls.items():
            cls.__call__ = call


def _routing(
    layer: Any,  # noqa: ANN401
    layer_idx: int,
    *,
    chosen: torch.Tensor,
    logits: torch.Tensor,
) -> dict[Probe, torch.Tensor]:
    """Weigh the chosen experts once more: mlx-lm does so inside a compiled function."""
    args = layer.mlp.args
    sigmoid = args.moe_router_activation_func == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    weights = scores.gather(-1, chosen)
    if args.moe_renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * args.routed_scaling_factor
    return {
        Probe(layer_idx, SCORES): scores + _as_torch(layer.mlp.e_score_correction_bias),
        Probe(layer_idx, ROUTER): torch.zeros_like(scores).scatter(-1, chosen, weights),
    }


def _recomputed(
    mixer: Any,  # noqa: ANN401
    layer_idx: int,
    values: Mapping[Probe, torch.Tensor],
) -> dict[Probe, torch.Tensor]:
    """Convolve, and compute the log decay, once more with the model's own parameters."""
    f = values[Probe(layer_idx, "kda.f")].unflatten(-1, (mixer.num_heads, -1))
    bias = _as_torch(mixer.dt_bias).reshape(mixer.num_heads, -1)
    rate = _as_torch(mixer.A_log).reshape(mixer.num_heads, 1).exp()
    found = {Probe(layer_idx, "kda.decay"): -rate * torch.nn.functional.softplus(f + bias)}
    for name in ("q", "k", "v"):
        taps = _as_torch(getattr(mixer, f"{name}_conv").conv.weight)  # [P, W, 1]
        x = values[Probe(layer_idx, f"kda.{name}")].transpose(1, 2)  # [B, P, T]
        padded = torch.nn.functional.pad(x, (taps.shape[1] - 1, 0))
        y = torch.nn.functional.conv1d(padded, taps.transpose(1, 2), groups=len(taps))
        silu = torch.nn.functional.silu(y)
        found[Probe(layer_idx, f"kda.{name}_conv")] = silu.transpose(1, 2)
    return found


def _continue(model: Any, request: OracleRequest) -> Greedy | None:  # noqa: ANN401
    cache = make_prompt_cache(model)
    return request.continued(lambda ids: _as_torch(model(mx.array([ids]), cache))[0, -1])


def _as_torch(values: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(values.astype(mx.float32)))


if __name__ == "__main__":
    answer_request(trace_with_mlx, sys.argv[1:])
