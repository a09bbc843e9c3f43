"""Ways to make a model wrong in one place: in the files of an artifact, or in what runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kimi_convert.kernels.kda import Gate
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.loading import LayerLoader
from kimi_convert.model.numerics import RouterWeight
from tests.integration.broken import change_config, change_tensors

ATTENTION = "model.layers.{}.self_attn."


def artifact_with(fault: Callable[[Path], None], checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    fault(folder)
    return folder


def permute_heads_of_k(folder, layer_idx=1, head_dim=16):
    name = ATTENTION.format(layer_idx) + "k_proj.weight"

    def swap(tensors):
        heads = tensors[name].unflatten(0, (-1, head_dim))
        tensors[name] = heads[[1, 0, 2, 3]].flatten(0, 1).contiguous()

    change_tensors(folder, swap)


def round_a_log(folder, layer_idx=2):
    name = ATTENTION.format(layer_idx) + "A_log"
    change_tensors(folder, lambda t: t.update({name: t[name].bfloat16().float()}))


def swap_experts_of_two_layers(folder):
    one, other = (f"model.layers.{i}.block_sparse_moe.experts.2.w1.weight" for i in (1, 2))
    change_tensors(folder, lambda t: t.update({one: t[other], other: t[one]}))


def move_eps(folder):
    change_config(folder, rms_norm_eps=2e-5)


def narrow_bias_of_router(folder, layer_idx=2):
    name = f"model.layers.{layer_idx}.block_sparse_moe.gate.e_score_correction_bias"
    change_tensors(folder, lambda t: t.update({name: t[name].bfloat16().float()}))


def plant(monkeypatch, layer_idx: int, fault: Callable[[DecoderLayer], None], *, dtype) -> None:
    """Have one layer be wrong in every run of a dtype."""
    load = LayerLoader.layer

    def wrong(loader: LayerLoader, at: int) -> DecoderLayer:
        layer = load(loader, at)
        if at == layer_idx and loader.dtype is dtype:
            fault(layer)
        return layer

    monkeypatch.setattr(LayerLoader, "layer", wrong)


def bound_the_gate(layer):
    law = layer.kda.gate_law()
    layer.kda.gate_law = lambda: Gate(A_log=law.A_log, dt_bias=law.dt_bias, lower_bound=-5.0)


def exchange_k_and_v(layer):
    """Hand the state over transposed between two calls."""

    def transpose(module, inputs):
        _, cache = inputs
        if cache.state is not None:
            cache.state = cache.state.transpose(-1, -2).contiguous()

    layer.kda.register_forward_pre_hook(transpose)


def keep_state_transposed(layer):
    """Keep the state as [B, H, V, K] after the last token."""

    def transpose(module, inputs, output):
        _, cache = inputs
        cache.state = cache.state.transpose(-1, -2).contiguous()

    layer.kda.register_forward_hook(transpose)


def bias_the_routing(layer):
    router = layer.moe.router
    router.numerics = replace(router.numerics, router_weight=RouterWeight.BIASED)


def move_eps_of_latent(layer):
    layer.mla.kv_a_norm.eps = 1e-4


def bound_their_gate(forget_gate):
    """Replace the law in transformers' gate by the bounded one."""

    def forward(hidden_states):
        shape = (*hidden_states.shape[:2], -1, forget_gate.head_dim)
        f = forget_gate.f_b_proj(forget_gate.f_a_proj(hidden_states)) + forget_gate.dt_bias
        return -5.0 * torch.sigmoid(forget_gate.A_log.exp() * f.view(shape))

    forget_gate.forward = forward
