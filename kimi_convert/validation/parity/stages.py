"""The places where implementations are compared, in the order in which a model runs through them.

A stage is one sub-module of a layer, under the name that this project's models give it. Every
implementation reports those that it can; two are compared on those that both report. Shapes are
[B, T, ...] unless the table says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

EMBED, HIDDEN, LOGITS = "embed", "hidden", "logits"
STATE, LATENTS = "kda.state", "mla.latents"
SCORES, ROUTER = "moe.scores", "moe.router"


@dataclass(frozen=True, slots=True)
class Stage:
    """One sub-module, and what can be wrong with what comes out of it."""

    name: str
    made_of: str


STAGES = (
    Stage(EMBED, "embedding matrix"),
    Stage("input_norm", "norm before the mixer: its weight, eps"),
    Stage("kda.q", "q projection"),
    Stage("kda.k", "k projection"),
    Stage("kda.v", "v projection"),
    Stage("kda.q_conv", "convolution of q and SiLU"),
    Stage("kda.k_conv", "convolution of k and SiLU"),
    Stage("kda.v_conv", "convolution of v and SiLU"),
    Stage("kda.f", "projection of the decay gate: f_a, f_b"),
    Stage("kda.decay", "log decay: A_log, dt_bias, the gate law"),
    Stage("kda.b", "projection of the write strength"),
    Stage("kda.recurrence", "unit norm of q and k, sigmoid of beta, state, scale"),
    Stage(STATE, "the state after the last token, [B, H, K, V]"),
    Stage("kda.g", "projection of the output gate: g_a, g_b"),
    Stage("kda.o_norm", "norm of the output: its weight, eps, gate"),
    Stage("kda.o", "output projection"),
    Stage("mla.q_a", "q, projected down"),
    Stage("mla.q_a_norm", "norm of q's latent: its weight, eps"),
    Stage("mla.q", "q projection, before rotation"),
    Stage("mla.kv_a", "latent and shared key, projected"),
    Stage("mla.kv_a_norm", "norm of the latent: its weight, eps"),
    Stage(LATENTS, "what is cached, [B, S, R + r]: latent after its norm, shared key"),
    Stage("mla.attention", "keys and values of the latent (kv_b), rotation, scale, softmax"),
    Stage("mla.o", "output projection"),
    Stage("mlp_norm", "norm before the feed-forward: its weight, eps"),
    Stage(SCORES, "what experts are chosen by, [B, T, E]: router, its bias"),
    Stage(ROUTER, "factors on the experts, [B, T, E]: choice, renormalisation, scaling"),
    Stage("moe.experts", "routed experts"),
    Stage("moe.shared", "shared experts"),
    Stage("feed_forward", "feed-forward as a whole"),
    Stage(HIDDEN, "residual additions"),
    Stage(LOGITS, "final norm, output matrix"),
)
_ORDER = {stage.name: place for place, stage in enumerate(STAGES)}
_MADE_OF = {stage.name: stage.made_of for stage in STAGES}
_BEFORE, _AFTER = -1, 1_000_000


class Probe(NamedTuple):
    """A stage of one layer, counted from 0."""

    layer_idx: int
    stage: str

    @property
    def place(self) -> tuple[int, int]:
        """Where it comes among all probes of a model."""
        return self.layer_idx, _ORDER[self.stage]

    @property
    def name(self) -> str:
        """Its name for people: `layers.3.kda.decay`, `logits`."""
        return (
            self.stage
            if self.layer_idx in (_BEFORE, _AFTER)
            else f"layers.{self.layer_idx}.{self.stage}"
        )

    @property
    def made_of(self) -> str:
        """What can be wrong where this is the first that differs."""
        return _MADE_OF[self.stage]


EMBED_PROBE = Probe(_BEFORE, EMBED)
LOGITS_PROBE = Probe(_AFTER, LOGITS)


def in_order(probes: Iterable[Probe]) -> list[Probe]:
    """Return probes in the order in which a model runs through them."""
    return sorted(probes, key=lambda probe: probe.place)
