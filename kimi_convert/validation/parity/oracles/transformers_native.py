"""transformers' own classes: KimiLinearForCausalLM and, for teachers, DeepseekV3ForCausalLM.

Classes are named, so no code from a checkpoint runs.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from kimi_convert.config.huggingface import read_config
from kimi_convert.validation.parity.oracles.hearing import (
    OF_KDA,
    OF_LAYER,
    OF_MLA,
    Stages,
    heard_in,
    module_at,
)
from kimi_convert.validation.parity.oracles.process import (
    DECODE,
    OracleRequest,
    answer_request,
    decline,
)
from kimi_convert.validation.parity.stages import (
    EMBED_PROBE,
    LOGITS_PROBE,
    ROUTER,
    SCORES,
    STATE,
    Probe,
)
from kimi_convert.validation.parity.trace import Greedy, Trace

CLASSES = {
    "kimi_linear": "KimiLinearForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
}
# Its models take kernels of these wherever they can be imported, on the CPU too, where none runs.
_GPU_KERNELS = ("causal_conv1d", "fla")
_OF_KDA: Stages = {
    **OF_LAYER,
    **OF_KDA,
    "self_attn.forget_gate.f_b_proj": ("", "kda.f"),
    "self_attn.forget_gate": ("", "kda.decay"),
    "mlp.experts": ("", "moe.experts"),
}
_OF_MLA: Stages = {
    **OF_LAYER,
    **OF_MLA,
    "self_attn.q_a_proj": ("", "mla.q_a"),
    "self_attn.q_a_layernorm": ("", "mla.q_a_norm"),
    "self_attn.q_b_proj": ("", "mla.q"),
    "mlp.experts": ("", "moe.experts"),
}
_Pieces = defaultdict[Probe, list[torch.Tensor]]


@torch.inference_mode()
def trace_with_transformers(request: OracleRequest) -> dict[str, Trace]:
    """Run a request."""
    model = load(request.folder)
    greedy = _continue(model, request)
    return {
        form: Trace(trace_model(model, request.token_ids, decode=form == DECODE), greedy)
        for form in request.forms
    }


def load(folder: str) -> Any:  # noqa: ANN401  (transformers' models have no useful type)
    """Load a checkpoint in fp32, and require that every tensor found its place.

    Ends the process where the installed version has no class for this model.

    Raises:
        ValueError: a tensor did not.
    """
    name = CLASSES[read_config(Path(folder)).model_type]
    with _hidden(_GPU_KERNELS):
        cls = getattr(transformers, name, None)  # imports the model's module
    if cls is None:
        decline(f"transformers {transformers.__version__} has no {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within their own code
        model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    parameters = dict(model.named_parameters())
    # A model without shared experts has them with no rows there.
    missing = [n for n in info["missing_keys"] if n not in parameters or parameters[n].numel()]
    wrong = [*missing, *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(f"tensors that did not find their place: {wrong[:3]}")
    return model.eval()


@contextmanager
def _hidden(packages: Iterable[str]) -> Generator[None]:
    """Have imports of some packages fail."""
    modules: dict[str, Any] = sys.modules  # None stands for a failure
    kept = {package: modules.get(package) for package in packages}
    modules.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        for package, module in kept.items():
            del modules[package]
            if module is not None:
                modules[package] = module


@torch.inference_mode()
def trace_model(
    model: Any,  # noqa: ANN401
    tokens: torch.Tensor,
    *,
    decode: bool = False,
) -> dict[Probe, torch.Tensor]:
    """Run tokens [B, T] through a loaded model and return its values by probe."""
    pieces: _Pieces = defaultdict(list)
    hooks = [model.model.embed_tokens.register_forward_hook(_keep(pieces, EMBED_PROBE))]
    for layer_idx, layer in enumerate(model.model.layers):
        hooks += _listen(layer, layer_idx, pieces)
    cache: Any = transformers.DynamicCache(config=model.config)
    parts = tokens.split(1 if decode else tokens.shape[1], 1)
    logits = [model(part, past_key_values=cache, use_cache=True).logits for part in parts]
    for hook in hooks:
        hook.remove()
    values = {probe: _join(parts, *tokens.shape) for probe, parts in pieces.items()}
    for layer_idx, layer in enumerate(model.model.layers):
        if hasattr(layer.self_attn, "forget_gate"):
            values |= _convolved(layer.self_attn, layer_idx, values)
            state = cache.layers[layer_idx].recurrent_states[0]
            values[Probe(layer_idx, STATE)] = state.float()
    return values | {LOGITS_PROBE: torch.cat(logits, 1).float()}


def _listen(layer: nn.Module, layer_idx: int, pieces: _Pieces) -> list[Any]:
    stages = _OF_KDA if hasattr(layer.self_attn, "forget_gate") else _OF_MLA
    hooks = [
        heard.module.register_forward_hook(_keep(pieces, heard.given, heard.taken))
        for heard in heard_in(layer, layer_idx, stages)
    ]
    router = module_at(layer, "mlp.gate")
    if router is not None:
        hooks.append(router.register_forward_hook(_keep_routing(pieces, layer_idx)))
    return hooks


def _keep(pieces: _Pieces, given: Probe | None, taken: Probe | None = None) -> Callable[..., None]:
    def record(module: nn.Module, inputs: tuple[Any, ...], found: Any) -> None:  # noqa: ANN401
        if taken is not None:
            pieces[taken].append(inputs[0])
        if given is not None:
            pieces[given].append(found[0] if isinstance(found, tuple) else found)

    return record


def _keep_routing(pieces: _Pieces, layer_idx: int) -> Callable[..., None]:
    def record(module: Any, inputs: tuple[Any, ...], found: Any) -> None:  # noqa: ANN401
        logits, weights, experts = found
        scores = logits.float().sigmoid() + module.e_score_correction_bias
        pieces[Probe(layer_idx, SCORES)].append(scores)
        dense = torch.zeros_like(scores).scatter(1, experts, weights.to(scores.dtype))
        pieces[Probe(layer_idx, ROUTER)].append(dense)

    return record


def _join(parts: list[torch.Tensor], batch_size: int, num_tokens: int) -> torch.Tensor:
    """Bring pieces, whose tokens lie in one axis or in two, to [B, T, ...]."""
    shaped = []
    for part in parts:
        per_sequence = num_tokens // len(parts)
        in_one_axis = part.shape[:2] != (batch_size, per_sequence)
        rest = part.shape[1 if in_one_axis else 2 :]
        shaped.append(part.reshape(batch_size, per_sequence, *rest))
    return torch.cat(shaped, 1).float()


def _convolved(
    mixer: Any,  # noqa: ANN401
    layer_idx: int,
    values: Mapping[Probe, torch.Tensor],
) -> dict[Probe, torch.Tensor]:
    """Convolve once more with the model's own taps: it does so inside a larger function."""
    names = ("q", "k", "v")
    x = torch.cat([values[Probe(layer_idx, f"kda.{name}")] for name in names], -1)
    convolved = mixer.conv1d(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
    parts = nn.functional.silu(convolved).chunk(len(names), -1)
    found = zip(names, parts, strict=True)
    return {Probe(layer_idx, f"kda.{name}_conv"): part for name, part in found}


def _continue(model: Any, request: OracleRequest) -> Greedy | None:  # noqa: ANN401
    cache = transformers.DynamicCache(config=model.config)

    def step(ids: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits
        return logits[0, -1].float()

    return request.continued(step)


if __name__ == "__main__":
    answer_request(trace_with_transformers, sys.argv[1:])
