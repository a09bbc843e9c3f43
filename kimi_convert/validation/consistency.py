"""Whether every way to compute the same logits gives the same logits.

One chunked prefill is the reference. Against it: the recurrent form, a cached prefill in pieces
that no chunk boundary meets, and a decode token by token; where Triton kernels run, also a prefill
in plain torch. Layers are run one at a time with
every form side by side, so memory holds one layer, whatever the model's size.

All forms use the experts that the reference chose. Where two experts score almost alike, the last
bit of rounding decides between them, and the logits of that token then differ by per cents: true
of any two runs, and no news about the forms. How often it would have happened is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.kernels.backend import Backend, resolve_backend
from kimi_convert.model.backend import use_backend
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.cache import LayerCache, new_cache
from kimi_convert.model.kda import KdaForm
from kimi_convert.model.loading import LayerLoader, open_layers
from kimi_convert.model.moe import Routing
from kimi_convert.validation.bounds import error_bound
from kimi_convert.validation.metrics import MaxRelativeError, token_slices
from kimi_convert.validation.options import ValidationOptions
from kimi_convert.validation.report import ConsistencyReport, FormError

_LOGITS_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Form:
    """One way to run the tokens: with a cache if they come in pieces."""

    name: str
    kda_form: KdaForm
    pieces: Callable[[int], list[int]] | None  # number of tokens -> sizes
    needs_kda: bool = False
    backend: Backend | None = None  # other than the one that was chosen


def _uneven(num_tokens: int) -> list[int]:
    """Cut after 1 token, about a third and about a half: off the boundaries of chunks."""
    cuts = sorted({0, 1, num_tokens // 3, num_tokens // 2 + 1, num_tokens})
    return [stop - start for start, stop in pairwise(cuts)]


def _single(num_tokens: int) -> list[int]:
    return [1] * num_tokens


_PREFILL = _Form("chunked prefill", KdaForm.CHUNK, None)
_FORMS = (
    _Form("recurrent prefill", KdaForm.RECURRENT, None, needs_kda=True),
    _Form("prefill in pieces", KdaForm.CHUNK, _uneven),
    _Form("decode token by token", KdaForm.RECURRENT, _single),
)
_PLAIN = _Form("prefill in plain torch", KdaForm.CHUNK, None, backend=Backend.TORCH)


@torch.inference_mode()
def measure_consistency(
    checkpoint: Path,
    tokens: torch.Tensor,
    *,
    source: str,
    options: ValidationOptions,
    on_progress: ProgressCallback,
) -> ConsistencyReport:
    """Run tokens [B, T] int64 through every form and compare the logits.

    Args:
        checkpoint: the folder.
        tokens: the same for every form.
        source: where the tokens come from, for the report.
        options: dtype, device, backend and numerics.
        on_progress: told of every layer.
    """
    with open_layers(
        checkpoint,
        dtype=options.torch_dtype,
        device=options.device,
        numerics=options.numerics,
        backend=options.backend,
    ) as layers:
        num_layers = layers.config.num_layers
        forms = _forms(layers)
        embedded = layers.embedding()(tokens.to(options.device))  # [B, T, D]
        streams = {form: _Stream(embedded) for form in (_PREFILL, *forms)}
        for layer_idx in range(num_layers):
            on_progress(ProgressEvent("comparing forms", layer_idx, num_layers, "layers"))
            _run_layer(layers, layer_idx, streams)
        on_progress(ProgressEvent("comparing forms", num_layers, num_layers, "layers"))
        head = layers.head()
        expected = streams.pop(_PREFILL).hidden
        errors = {
            form: _logits_error(head, stream.hidden, expected, vocab_size=layers.config.vocab_size)
            for form, stream in streams.items()
        }
    bound = error_bound(options.torch_dtype, num_layers)
    return ConsistencyReport(
        tokens=source,
        sequences=tokens.shape[0],
        sequence_length=tokens.shape[1],
        bound=bound,
        forms=tuple(
            FormError(form.name, error, streams[form].rerouted, error <= bound)
            for form, error in errors.items()
        ),
    )


def _forms(layers: LayerLoader) -> list[_Form]:
    """Return the forms that say something about this model, where it runs."""
    forms = [form for form in _FORMS if layers.config.kda_layers or not form.needs_kda]
    runs_on = resolve_backend(
        layers.backend, where="validate", device=layers.device, dtype=layers.dtype
    )
    return [*forms, _PLAIN] if runs_on is Backend.TRITON else forms


@dataclass(slots=True)
class _Stream:
    """The tokens of one form on their way through the layers."""

    hidden: torch.Tensor  # [B, T, D]
    rerouted: int = 0


class _Choices:
    """Keeps the first routing of a layer, and has it used in place of the later ones."""

    def __init__(self) -> None:
        self._first: Routing | None = None
        self.rerouted = 0  # tokens of the last run that had chosen other experts

    def __call__(self, router: nn.Module, inputs: object, found: Routing) -> Routing:
        """Stand in for the result of a router, as a forward hook."""
        if self._first is None:
            self._first = found
        same = found.experts.sort(-1).values == self._first.experts.sort(-1).values
        self.rerouted = int((~same.all(-1)).sum())
        return self._first


@contextmanager
def _same_experts(layer: DecoderLayer) -> Generator[_Choices]:
    choices = _Choices()
    hook = None if layer.moe is None else layer.moe.router.register_forward_hook(choices)
    try:
        yield choices
    finally:
        if hook is not None:
            hook.remove()


def _run_layer(layers: LayerLoader, layer_idx: int, streams: Mapping[_Form, _Stream]) -> None:
    """Load one layer, and advance every stream by it."""
    layer = layers.layer(layer_idx)
    with _same_experts(layer) as choices:
        for form, stream in streams.items():
            use_backend(layer, form.backend or layers.backend)
            cache = new_cache(
                layers.config, len(stream.hidden), dtype=layers.dtype, device=layers.device
            )
            mixed = _mix(layer, stream.hidden, cache.layers[layer_idx], form)
            # The feed-forward sees each token alone: how tokens are cut is nothing to it.
            hidden = stream.hidden + mixed
            stream.hidden = hidden + layer.feed_forward(hidden)
            stream.rerouted += choices.rerouted


def _mix(
    layer: DecoderLayer, hidden: torch.Tensor, cache: LayerCache, form: _Form
) -> torch.Tensor:
    if form.pieces is None:
        return layer.mix(hidden, kda_form=form.kda_form)
    parts = hidden.split(form.pieces(hidden.shape[1]), 1)
    return torch.cat([layer.mix(part, cache, kda_form=form.kda_form) for part in parts], 1)


def _logits_error(
    head: Callable[[torch.Tensor], torch.Tensor],
    found: torch.Tensor,
    expected: torch.Tensor,
    *,
    vocab_size: int,
) -> float:
    error = MaxRelativeError()
    found, expected = found.flatten(0, 1), expected.flatten(0, 1)  # [B T, D]
    for part in token_slices(len(found), vocab_size=vocab_size, max_bytes=_LOGITS_BYTES):
        error.add(head(found[part]), head(expected[part]))
    return error.value
