"""What a fitted hybrid can still look up in its context, beside its teacher: the probes of `recall`.

One more pass over the teacher, with the mixers, and all else that was trained, as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.calibration.ends import stored_ends
from kimi_convert.conversion.calibration.rest import stored_rest
from kimi_convert.conversion.calibration.sequential import SequentialInput, fitted_student
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.calibration.streams import advance, batches, make_stream
from kimi_convert.model.loading import LayerLoader
from kimi_convert.model.recall import ProbeResult, SizedProbe, accuracy, probes_of

_STAGE = "probing"
_PROBED = "probed"


@dataclass(frozen=True, slots=True)
class _Streams:
    """The hidden states [N, T, D] of one probe."""

    probe: SizedProbe
    guide: torch.Tensor
    student: torch.Tensor


@torch.no_grad()
def probe_hybrid(
    teacher: LayerLoader,
    given: SequentialInput,
    name_of: Mapping[int | None, str],
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> Sequence[ProbeResult]:
    """Ask both models, or return what the store has of it.

    Args:
        teacher: the source.
        given: of the second pass.
        name_of: what the store calls each layer's parameters, and under None those outside of
            layers, where the hybrid shares nothing with its teacher.
        store: with fitted layers.
        on_progress: told of layers.
    """
    if not store.has(_PROBED):
        probes = probes_of(given.text.tokens, teacher.config, seed=given.seed)
        found = _ask(teacher, given, probes, name_of, store, on_progress)
        store.save(_PROBED, {}, {"probes": [one.to_json() for one in found]})
    noted = store.record(_PROBED)["probes"]
    assert isinstance(noted, list)
    return tuple(ProbeResult(**one) for one in noted)


def _ask(
    teacher: LayerLoader,
    given: SequentialInput,
    probes: Sequence[SizedProbe],
    name_of: Mapping[int | None, str],
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> list[ProbeResult]:
    num_layers = teacher.config.num_layers
    outside = store.tensors(name_of[None]) if None in name_of else None
    streams = _first_streams(teacher, probes, outside, store)
    for layer_idx in range(num_layers):
        on_progress(ProgressEvent(_STAGE, layer_idx, num_layers, "layers"))
        layer = teacher.layer(layer_idx)
        fitted = store.tensors(name_of[layer_idx])
        student, matrix = fitted_student(layer, layer_idx, fitted, given)
        rest = layer if outside is None else stored_rest(teacher, layer_idx, fitted)
        for one in streams:
            for rows in batches(len(one.guide)):
                advance(one.guide, layer, layer.mix(one.guide[rows]), rows)
                x = rest.input_norm(one.student[rows])
                advance(one.student, rest, student.features(x) @ matrix, rows)
    on_progress(ProgressEvent(_STAGE, num_layers, num_layers, "layers"))
    head = teacher.head()
    own = head if outside is None else stored_ends(teacher, outside).head
    return [
        ProbeResult(
            name=one.probe.name,
            size=one.probe.size,
            answers=len(one.probe.probe.answers),
            student=accuracy(one.probe.probe, one.student, own),
            teacher=accuracy(one.probe.probe, one.guide, head),
        )
        for one in streams
    ]


def _first_streams(
    teacher: LayerLoader,
    probes: Sequence[SizedProbe],
    outside: Mapping[str, torch.Tensor] | None,
    store: CalibrationStore,
) -> list[_Streams]:
    """Return what goes into the first layer of both models."""
    embed = teacher.embedding()
    own = embed if outside is None else stored_ends(teacher, outside).embed
    return [
        _Streams(
            one,
            make_stream(one.probe.inputs, embed, spill=store.folder),
            make_stream(one.probe.inputs, own, spill=store.folder),
        )
        for one in probes
    ]
