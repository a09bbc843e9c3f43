"""What ONNX tests compare: logits and states of a graph with those of the reference model."""

from __future__ import annotations

import numpy as np
import torch

from kimi_convert.model.cache import KdaCache, new_cache

# What the project promises for fp32 models of any depth, as in `validation.consistency`.
FP32_BOUND = 1e-5


def error(found, wanted):
    """The largest difference, relative to the largest value that is wanted."""
    wanted = np.asarray(wanted, dtype=np.float64)
    difference = np.abs(np.asarray(found, dtype=np.float64) - wanted)
    return float(difference.max() / np.abs(wanted).max())


@torch.inference_mode()
def reference_run(model, tokens):
    """Return logits [B, T, vocab] and the cache after tokens [B, T] of numpy."""
    cache = new_cache(model.config, tokens.shape[0], dtype=torch.float32)
    return model(torch.from_numpy(tokens), cache).numpy(), cache


@torch.inference_mode()
def reference_states(model, cache, *, latent=False):
    """Return what a graph keeps, by the inputs' names."""
    states = {}
    for layer_idx, (layer, kept) in enumerate(zip(model.layers, cache.layers, strict=True)):
        name = f"past_key_values.{layer_idx}."
        if isinstance(kept, KdaCache):
            taps = (kept.q_conv, kept.k_conv, kept.v_conv)
            states[name + "conv_state"] = torch.cat(taps, dim=1).numpy()
            states[name + "recurrent_state"] = kept.state.numpy()
        elif latent:
            states[name + "latent"] = kept._rows[:, None, : kept.length].numpy()
        else:
            keys, values = layer.mla._keys_values(kept._rows[:, : kept.length])
            states[name + "key"] = keys.transpose(1, 2).numpy()
            states[name + "value"] = values.transpose(1, 2).numpy()
    return states


def run_pieces(session, tokens, sizes):
    """Run tokens [B, T] in pieces; return all logits and the states after them."""
    states = session.new_states(tokens.shape[0])
    parts, start = [], 0
    for size in sizes:
        parts.append(session.run(tokens[:, start : start + size], states))
        start += size
    assert start == tokens.shape[1]
    return np.concatenate(parts, axis=1), states


def state_errors(model, cache, states):
    """Return the error of every state; values of MLA layers may be padded with zeros."""
    errors = {}
    latent = any(name.endswith("latent") for name in states.values)
    for name, wanted in reference_states(model, cache, latent=latent).items():
        found = states.values[name].numpy()
        assert not found[..., wanted.shape[-1] :].any(), name
        errors[name] = error(found[..., : wanted.shape[-1]], wanted)
    assert errors.keys() == states.values.keys()
    return errors
