"""The numbers that fill the naming tables, computed once from a `ModelConfig`.

Layer sets, axis sizes, and the tensors that a checkpoint of that config must and may hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kimi_convert.checkpoints.dtypes import dtype_from_torch_name
from kimi_convert.checkpoints.mapping import (
    Drop,
    Dropped,
    Entry,
    Layout,
    Name,
    count_kinds,
    expand,
    expand_drops,
    holes,
    match,
    places,
)
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.checkpoints.weights import Weight, read_weights
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.quantization import read_quantization
from kimi_convert.model.names import bailing_hybrid, deepseek, kimi_linear

WEIGHT_DTYPES = ("BF16", "F16", "F32")

_TABLES: dict[str, tuple[tuple[Name, ...], tuple[Drop, ...]]] = {
    "deepseek_v2": (deepseek.NAMES, deepseek.DROPS),
    "deepseek_v3": (deepseek.NAMES, deepseek.DROPS),
    "kimi_k2": (deepseek.NAMES, deepseek.DROPS),
    "kimi_linear": (kimi_linear.NAMES, kimi_linear.DROPS),
    "bailing_hybrid": (bailing_hybrid.NAMES, bailing_hybrid.DROPS),
}


def layout_of(config: ModelConfig) -> Layout:
    """Return layer sets and axis sizes."""
    return Layout(
        layers=_layer_sets(config),
        num_experts=config.moe.num_experts if config.moe else 0,
        axes=_axes(config),
    )


def expected_entries(config: ModelConfig) -> tuple[Entry, ...]:
    """Return every tensor that a checkpoint of this config must hold, layer by layer."""
    names, _ = _TABLES[config.model_type]
    entries = expand(names, layout_of(config))
    # Embedding first, then layers, then norm and head: the order in which a model runs.
    last = config.num_layers
    rank = {"embed.weight": -1, "norm.weight": last, "head.weight": last + 1}
    return tuple(
        sorted(entries, key=lambda e: rank[e.param] if e.layer_idx is None else e.layer_idx)
    )


def tensor_kinds(config: ModelConfig) -> Iterator[tuple[Name, tuple[int, ...], int]]:
    """Give each kind of tensor that a checkpoint must hold: its row, its shape and its number."""
    names, _ = _TABLES[config.model_type]
    return count_kinds(names, layout_of(config))


class MtpTensor(NamedTuple):
    """A tensor of an MTP layer: its parameter, and its name in the target."""

    param: str
    name: str


def mtp_tensors(source: ModelConfig, target: ModelConfig) -> dict[str, MtpTensor]:
    """Return every tensor of the source's MTP layers, by its name there.

    Their decoder layers are named as any layer of either format; the rest keeps its name.
    """
    ours, theirs = _TABLES[source.model_type][0], _TABLES[target.model_type][0]
    target_rows = {row.param: row for row in theirs}
    layout = layout_of(source)
    found: dict[str, MtpTensor] = {}
    for row in ours:
        if "layer" in holes(row.checkpoint) and row.param in target_rows:
            new = target_rows[row.param].checkpoint
            for layer_idx, expert_idx in places(row.checkpoint, "mtp", layout):
                fields = {"layer": layer_idx, "expert": expert_idx}
                tensor = MtpTensor(row.param.format(**fields), new.format(**fields))
                found[row.checkpoint.format(**fields)] = tensor
    found |= {
        name: MtpTensor(name, name)
        for template in deepseek.MTP_ONLY
        for layer_idx in layout.layers["mtp"]
        if (name := template.format(layer=layer_idx))
    }
    return found


@dataclass(frozen=True, slots=True)
class MatchedCheckpoint:
    """Every parameter with the weight that holds it, and what is left out with its reason."""

    entries: tuple[Entry, ...]
    weights: Mapping[str, Weight]  # by parameter
    dropped: tuple[Dropped, ...]  # stored tensors
    unread: Mapping[str, Weight]  # by name: the weights among what is dropped
    multimodal: bool  # whether parts other than the text model are among it

    @property
    def stored_names(self) -> dict[str, str]:
        """Parameter -> name in the files, of the values where a weight is quantised."""
        return {param: weight.stored[0].name for param, weight in self.weights.items()}


def match_checkpoint(
    config: ModelConfig, stored: Iterable[TensorSpec], *, where: object
) -> MatchedCheckpoint:
    """Hold the tensors of a checkpoint against its config; quantised weights count as one each.

    Raises:
        ConfigError: the checkpoint is quantised in a way that is not supported.
        CheckpointError: see `checkpoints.mapping.match` and `checkpoints.weights.read_weights`.
    """
    _, drops = _TABLES[config.model_type]
    weights = read_weights(
        stored,
        quantization=read_quantization(config.quantization, where=where),
        dtype=dtype_from_torch_name(config.dtype),
        where=where,
    )
    found = match(
        expected_entries(config),
        weights.by_name.values(),
        droppable=expand_drops(drops, layout_of(config)),
        dtypes=WEIGHT_DTYPES,
        where=where,
    )
    unread = {one.name: weights.by_name[one.name] for one in found.dropped}
    dropped = (
        Dropped(name, one.why)
        for one in found.dropped
        for name in weights.by_name[one.name].stored_names
    )
    return MatchedCheckpoint(
        found.entries,
        {param: weights.by_name[name] for param, name in found.stored_names.items()},
        (*dropped, *weights.left_out),
        unread,
        bool(weights.left_out),
    )


def _layer_sets(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    every = tuple(range(config.num_layers))
    mtp = tuple(range(config.num_layers, config.num_layers + config.num_mtp_layers))
    moe_layers, mla_layers = config.moe_layers, config.mla_layers
    low_rank_q = config.mla.q_lora_rank is not None
    shared = config.moe is not None and config.moe.num_shared_experts > 0
    biased = config.moe is not None and config.moe.has_correction_bias
    return {
        "all": every,
        "kda": config.kda_layers,
        "mla": mla_layers,
        "mla_full_q": () if low_rank_q else mla_layers,
        "mla_low_rank_q": mla_layers if low_rank_q else (),
        "dense": tuple(i for i in every if i not in set(moe_layers)),
        "moe": moe_layers,
        "moe_bias": moe_layers if biased else (),
        "moe_unbiased": () if biased else moe_layers,
        "moe_shared": moe_layers if shared else (),
        "untied": () if config.tie_word_embeddings else every,
        "mtp": mtp,
        "all_and_mtp": every + mtp,
    }


def _axes(config: ModelConfig) -> dict[str, int]:
    mla, kda, moe = config.mla, config.kda, config.moe
    kda_head_dim = kda.head_dim if kda else 0
    kda_heads = kda.num_heads if kda else 0
    expert = moe.intermediate_size if moe else 0
    return {
        "one": 1,
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "dense": config.intermediate_size,
        "q": mla.num_heads * mla.qk_head_dim,
        "q_latent": mla.q_lora_rank or 0,
        "kv_latent": mla.kv_lora_rank,
        "kv_a": mla.kv_lora_rank + mla.qk_rope_head_dim,
        "kv_b": mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim),
        "mla_heads": mla.num_heads,
        "attention": mla.num_heads * mla.v_head_dim,
        "kda_heads": kda_heads,
        "kda_head_dim": kda_head_dim,
        "kda": kda_heads * kda_head_dim,
        "conv": kda.conv_size if kda else 0,
        "experts": moe.num_experts if moe else 0,
        "expert": expert,
        "shared": expert * (moe.num_shared_experts if moe else 0),
    }
