"""Trace our reference model on a checkpoint: one layer in memory at a time, in any form.

The greedy continuation alone needs the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from kimi_convert.config.progress import ProgressCallback, ProgressEvent, ignore_progress
from kimi_convert.kernels.backend import Backend
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.cache import KdaCache, LayerCache, MlaCache, new_cache
from kimi_convert.model.kda import KdaForm
from kimi_convert.model.loading import load_model, open_layers
from kimi_convert.model.numerics import SERVED, Numerics
from kimi_convert.validation.parity.greedy import continue_by
from kimi_convert.validation.parity.probes import listening
from kimi_convert.validation.parity.routing import Follower, groups_of
from kimi_convert.validation.parity.stages import (
    EMBED_PROBE,
    HIDDEN,
    LATENTS,
    LOGITS_PROBE,
    ROUTER,
    SCORES,
    STATE,
    Probe,
)
from kimi_convert.validation.parity.trace import Greedy, Trace


def one_piece(num_tokens: int) -> list[int]:
    """Cut nothing."""
    return [num_tokens]


def uneven_pieces(num_tokens: int) -> list[int]:
    """Cut after 1 token, about a third and about a half: off the boundaries of chunks."""
    cuts = sorted({0, 1, num_tokens // 3, num_tokens // 2 + 1, num_tokens})
    return [stop - start for start, stop in pairwise(cuts)]


def single_tokens(num_tokens: int) -> list[int]:
    """Cut after every token."""
    return [1] * num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRun:
    """How the reference model runs."""

    kda_form: KdaForm = KdaForm.CHUNK
    pieces: Callable[[int], list[int]] = one_piece  # number of tokens -> sizes
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backend: Backend | None = Backend.TORCH
    numerics: Numerics = SERVED
    exchange: Callable[[DecoderLayer], None] | None = None  # what is done to every loaded layer


@torch.inference_mode()
def trace_checkpoint(
    folder: Path,
    tokens: torch.Tensor,
    run: TorchRun,
    *,
    follow: Trace | None = None,
    label: str = "running layers",
    on_progress: ProgressCallback = ignore_progress,
) -> Trace:
    """Run tokens [B, T] int64 through a checkpoint and keep every stage of every layer.

    Args:
        folder: the checkpoint.
        tokens: all sequences of one length.
        run: form, dtype, device, backend and numerics.
        follow: the reference, whose experts are taken where two scored alike.
        label: what progress is reported under.
        on_progress: told of every layer.
    """
    values: dict[Probe, torch.Tensor] = {}
    rerouted = 0
    with open_layers(
        folder, dtype=run.dtype, device=run.device, numerics=run.numerics, backend=run.backend
    ) as layers:
        num_layers = layers.config.num_layers
        cache = new_cache(layers.config, len(tokens), dtype=run.dtype, device=run.device)
        hidden = layers.embedding()(tokens.to(run.device))  # [B, T, D]
        values[EMBED_PROBE] = hidden.cpu()
        for layer_idx in range(num_layers):
            on_progress(ProgressEvent(label, layer_idx, num_layers, "layers"))
            layer = layers.layer(layer_idx)
            if run.exchange is not None:
                run.exchange(layer)
            follower = _follower(layer, layer_idx, follow, groups=groups_of(layers.config))
            hidden, found = _run_layer(layer, hidden, cache.layers[layer_idx], run, follower)
            rerouted += follower.followed if follower else 0
            values |= {Probe(layer_idx, stage): found[stage].cpu() for stage in found}
        on_progress(ProgressEvent(label, num_layers, num_layers, "layers"))
        values[LOGITS_PROBE] = layers.head()(hidden).cpu()
    return Trace(values, rerouted=rerouted)


@torch.inference_mode()
def continue_greedily(folder: Path, prompt: Sequence[int], count: int, run: TorchRun) -> Greedy:
    """Continue a prompt by `count` likeliest tokens, with a cache and without stopping."""
    model = load_model(
        folder, dtype=run.dtype, device=run.device, numerics=run.numerics, backend=run.backend
    )
    if run.exchange is not None:
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            run.exchange(layer)
    cache = new_cache(model.config, 1, dtype=run.dtype, device=run.device)

    def step(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids], device=run.device), cache)[0, -1].cpu()

    return continue_by(step, prompt, count)


def _follower(
    layer: DecoderLayer, layer_idx: int, follow: Trace | None, *, groups: int
) -> Follower | None:
    if follow is None or layer.moe is None:
        return None
    scores, weights = (
        follow.values[Probe(layer_idx, stage)].flatten(0, 1).to(layer.moe.router.weight.device)
        for stage in (SCORES, ROUTER)
    )
    return Follower(scores, weights, groups=groups)


def _run_layer(
    layer: DecoderLayer,
    hidden: torch.Tensor,
    cache: LayerCache,
    run: TorchRun,
    follower: Follower | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the hidden state [B, T, D] after a layer, and every stage on the way."""
    num_tokens = hidden.shape[1]
    with ExitStack() as stack:
        if follower is not None:
            assert layer.moe is not None
            # Before the listener, which then hears what is used.
            stack.callback(layer.moe.router.register_forward_hook(follower).remove)
        collected = stack.enter_context(listening(layer))
        parts = hidden.split(run.pieces(num_tokens), 1)
        mixed = torch.cat([layer.mix(part, cache, kda_form=run.kda_form) for part in parts], 1)
        # The feed-forward sees each token alone: how tokens are cut is nothing to it.
        hidden = hidden + mixed
        hidden = hidden + layer.feed_forward(hidden)
        found = collected(num_tokens)
    return hidden, found | {HIDDEN: hidden} | _kept(cache)


def _kept(cache: LayerCache) -> dict[str, torch.Tensor]:
    """Return what a layer remembers after the last token."""
    if isinstance(cache, KdaCache):
        assert cache.state is not None
        return {STATE: cache.state.clone()}
    assert isinstance(cache, MlaCache)
    return {LATENTS: cache.rows.clone()}
