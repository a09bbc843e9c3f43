"""flash-linear-attention's KDA layer in the place of ours: weights by a table of names, states behind our cache.

The layer is handed in as it was made, so nothing here imports the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn

from kimi_convert.kernels.kda import Gate
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.cache import KdaCache
from kimi_convert.model.kda import KdaForm, KimiDeltaAttention

# Parameter of our mixer -> of its layer.
NAMES: Mapping[str, str] = {
    "q.weight": "q_proj.weight",
    "k.weight": "k_proj.weight",
    "v.weight": "v_proj.weight",
    "q_conv.weight": "q_conv1d.weight",
    "k_conv.weight": "k_conv1d.weight",
    "v_conv.weight": "v_conv1d.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "b.weight": "b_proj.weight",
    "f_a.weight": "f_proj.0.weight",
    "f_b.weight": "f_proj.1.weight",
    "g_a.weight": "g_proj.0.weight",
    "g_b.weight": "g_proj.1.weight",
    "o_norm.weight": "o_norm.weight",
    "o.weight": "o_proj.weight",
}
# It has a bias on the output gate, and no checkpoint of a released model does: zeros.
WITHOUT_OURS = "g_proj.1.bias"
# Module of ours that is listened to -> its module.
_MODULES: Mapping[str, str] = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "q_conv": "q_conv1d",
    "k_conv": "k_conv1d",
    "v_conv": "v_conv1d",
    "b": "b_proj",
    "f_b": "f_proj.1",
    "g_b": "g_proj.1",
    "o_norm": "o_norm",
    "o": "o_proj",
}


def exchange_mixer(layer: DecoderLayer, make: Callable[[KimiDeltaAttention], nn.Module]) -> None:
    """Put another KDA layer with the same weights into a decoder layer; one of MLA stays.

    Args:
        layer: changed in place.
        make: returns a layer of the library, of the sizes and on the device of ours.
    """
    if layer.kda is not None:
        layer.kda = cast("KimiDeltaAttention", FlaMixer(layer.kda, make(layer.kda)))


def weights_for(ours: KimiDeltaAttention) -> dict[str, torch.Tensor]:
    """Return our mixer's weights under its names, in its shapes."""
    found = {theirs: ours.get_parameter(name).detach() for name, theirs in NAMES.items()}
    found["A_log"] = found["A_log"].flatten()  # [1, 1, H, 1] in checkpoints, [H] there
    return found | {WITHOUT_OURS: torch.zeros_like(ours.dt_bias)}


class FlaMixer(nn.Module):
    """Its layer, called and listened to as our `KimiDeltaAttention` is."""

    def __init__(self, ours: KimiDeltaAttention, theirs: nn.Module) -> None:
        """Give its layer our weights.

        Raises:
            RuntimeError: it has other tensors, or of other shapes.
        """
        super().__init__()
        theirs.load_state_dict(weights_for(ours), strict=True)
        self.theirs = theirs.eval().requires_grad_(requires_grad=False)
        self.num_heads = ours.num_heads
        for name, path in _MODULES.items():
            self.add_module(name, theirs.get_submodule(path))
        self._past = _Past()

    def forward(
        self, x: torch.Tensor, cache: KdaCache | None = None, *, form: KdaForm = KdaForm.AUTO
    ) -> torch.Tensor:
        """Mix x [B, T, D]; its layer chooses by itself: recurrent to 64 tokens, chunks above."""
        if cache is None:
            return self.theirs(x)[0]
        if cache.state is None:
            self._past = _Past()
        mixed = self.theirs(x, past_key_values=self._past, use_cache=True)[0]
        state = self._past.kept["recurrent_state"]  # [B, H, V, K]
        assert isinstance(state, torch.Tensor)
        cache.state = state.mT
        return mixed

    def gate_law(self) -> Gate:
        """Return the law of the decay with its layer's parameters."""
        return Gate(
            A_log=self.theirs.get_parameter("A_log"),
            dt_bias=self.theirs.get_parameter("dt_bias").unflatten(0, (self.num_heads, -1)),
        )


class _Past:
    """What its layer asks of a cache: states of one layer, under its number."""

    def __init__(self) -> None:
        self.kept: dict[str, object] = {}

    def __len__(self) -> int:
        return 1 if self.kept else 0

    def __getitem__(self, layer_idx: int) -> dict[str, object]:
        return self.kept

    def update(self, *, layer_idx: int, offset: int, **states: object) -> None:
        self.kept = states
