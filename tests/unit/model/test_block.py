"""A decoder layer: its kinds, its two halves, its gradients."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.model.cache import new_cache
from kimi_convert.model.kda import KdaForm
from tests.tiny import tiny_config
from tests.unit.model.build import random_hidden, random_layer

HYBRID = tiny_config("kimi_linear")
SOURCE = tiny_config("deepseek_v3")


@pytest.mark.parametrize(
    ("config", "layer_idx", "kinds"),
    [
        pytest.param(HYBRID, 0, {"kda", "mlp"}, id="dense-kda"),
        pytest.param(HYBRID, 1, {"kda", "moe"}, id="sparse-kda"),
        pytest.param(HYBRID, 3, {"mla", "moe"}, id="sparse-nope"),
        pytest.param(SOURCE, 0, {"mla", "mlp"}, id="dense-rope"),
        pytest.param(SOURCE, 1, {"mla", "moe"}, id="sparse-rope"),
    ],
)
def test_layer_has_the_mixer_and_feed_forward_of_its_place(config, layer_idx, kinds, tmp_path):
    layer = random_layer(tmp_path, config, layer_idx)
    present = {name for name in ("kda", "mla", "mlp", "moe") if getattr(layer, name) is not None}
    assert present == kinds


@pytest.mark.parametrize("layer_idx", range(4))
def test_halves_and_residuals_are_the_layer(layer_idx, tmp_path):
    layer, hidden = random_layer(tmp_path, HYBRID, layer_idx), random_hidden(HYBRID, 20)
    middle = hidden + layer.mix(hidden)
    assert torch.equal(layer(hidden), middle + layer.feed_forward(middle))


@pytest.mark.parametrize("layer_idx", [0, 3])
def test_mix_continues_from_a_cache(layer_idx, tmp_path):
    layer, hidden = random_layer(tmp_path, HYBRID, layer_idx), random_hidden(HYBRID, 20)
    cache = new_cache(HYBRID, 2, dtype=torch.float32).layers[layer_idx]
    layer.mix(hidden[:, :19], cache)
    torch.testing.assert_close(
        layer.mix(hidden[:, 19:], cache), layer.mix(hidden)[:, 19:], rtol=0, atol=1e-5
    )


def test_kda_form_reaches_the_mixer(tmp_path):
    layer, hidden = random_layer(tmp_path, HYBRID, 0), random_hidden(HYBRID, 70)
    chunk, recurrent = (
        layer(hidden, kda_form=form) for form in (KdaForm.CHUNK, KdaForm.RECURRENT)
    )
    # Two ways to sum in fp32: equal in the mathematics, not in the last bits.
    assert not torch.equal(chunk, recurrent)
    torch.testing.assert_close(chunk, recurrent, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer_idx", [0, 1, 3])
def test_one_layer_can_be_trained_alone(layer_idx, tmp_path):
    layer = random_layer(tmp_path, HYBRID, layer_idx).requires_grad_()
    hidden = random_hidden(HYBRID, 40)
    target = torch.zeros_like(hidden)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = (layer(hidden) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
