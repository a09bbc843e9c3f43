"""Which layers stay MLA: as many as the released pattern keeps, where they are worth most.

KDA and attention without rotation are complementary: layers that look a few tokens back are nearly
free as KDA and lost without rotation, layers that look everywhere or at a sink are the reverse.
Layers with the largest (cost as KDA) - (cost as MLA) are kept first; costs do not add up exactly,
so sets that differ from that one in a layer are run as whole students, with the released pattern
beside them. The nearest to the teacher wins, unless chance could have made it so: of the sets that
are no further behind it than two standard errors of the difference, over validation rows, the one
that has most layers in common with the released pattern is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.conversion.calibration.streams import batches, copy_stream, make_stream
from kimi_convert.conversion.calibration.students import Student
from kimi_convert.conversion.calibration.study import Study, StudyInput, divergences, future
from kimi_convert.model.loading import LayerLoader

_STAGE = "choosing layers"
_SWAPPED_OUT = 3  # of the kept layers, those that are worth least
_SWAPPED_IN = 3  # of the others, those that are worth most
_STANDARD_ERRORS = 2

KeptLayers = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """The layers that stay MLA, and what was compared."""

    kept: KeptLayers
    kl_of: Mapping[KeptLayers, float]  # before the sequential pass, on validation rows
    chance_of: Mapping[KeptLayers, float]  # nats that chance could put it behind the lowest KL


def candidate_sets(study: Study, released: KeptLayers) -> list[KeptLayers]:
    """Return the released pattern, the best by single costs, and sets a layer away from it."""
    worth = {n: study.kl_as_kda[n] - study.kl_as_mla[n] for n in study.kl_as_kda}
    ranked = sorted(worth, key=lambda n: (-worth[n], n))
    best, others = ranked[: len(released)], ranked[len(released) :]
    sets = [released, tuple(sorted(best))]
    sets += [
        tuple(sorted({*best, into} - {out}))
        for out in best[-_SWAPPED_OUT:]
        for into in others[:_SWAPPED_IN]
    ]
    return list(dict.fromkeys(sets))


def longest_run(kept: Sequence[int], num_layers: int) -> int:
    """Return how many layers in a row become KDA at most."""
    edges = [-1, *sorted(kept), num_layers]
    return max(b - a - 1 for a, b in pairwise(edges))


@torch.no_grad()
def choose_layers(
    teacher: LayerLoader,
    given: StudyInput,
    study: Study,
    sets: Sequence[KeptLayers],
    store: CalibrationStore,
    on_progress: ProgressCallback,
) -> LayerChoice:
    """Run a student for every set, side by side, the released pattern first, and choose."""
    first = make_stream(study.tokens, teacher.embedding(), spill=store.folder)
    streams = {kept: copy_stream(first, spill=store.folder) for kept in sets}
    num_layers = teacher.config.num_layers
    for layer_idx in range(num_layers):
        on_progress(ProgressEvent(_STAGE, layer_idx, num_layers, "layers"))
        layer = teacher.layer(layer_idx)
        kinds = {"mla" if layer_idx in kept else "kda" for kept in sets}
        mixers: dict[str, tuple[Student, torch.Tensor]] = {
            kind: future(kind, layer, layer_idx, given, store) for kind in kinds
        }
        for kept, stream in streams.items():
            student, matrix = mixers["mla" if layer_idx in kept else "kda"]
            for rows in batches(len(stream)):
                after = stream[rows] + student.features(layer.input_norm(stream[rows])) @ matrix
                stream[rows] = after + layer.feed_forward(after)
    on_progress(ProgressEvent(_STAGE, num_layers, num_layers, "layers"))
    head = teacher.head()
    rows_of = {
        kept: divergences(head, stream, study.log_probs) for kept, stream in streams.items()
    }
    return chosen(rows_of, released=sets[0])


def chosen(rows_of: Mapping[KeptLayers, torch.Tensor], *, released: KeptLayers) -> LayerChoice:
    """Choose by the KL of every validation row.

    Args:
        rows_of: [n] nats per token of each set, n at least 2.
        released: one of the sets.
    """
    kl_of = {kept: float(rows.mean()) for kept, rows in rows_of.items()}
    best = min(kl_of, key=lambda kept: (kl_of[kept], kept))
    chance_of = {
        kept: _STANDARD_ERRORS * float((rows - rows_of[best]).std()) / len(rows) ** 0.5
        for kept, rows in rows_of.items()
    }
    near = [kept for kept in kl_of if kl_of[kept] - kl_of[best] <= chance_of[kept]]
    kept = min(near, key=lambda kept: (-len({*kept} & {*released}), kl_of[kept], kept))
    return LayerChoice(kept=kept, kl_of=kl_of, chance_of=chance_of)
