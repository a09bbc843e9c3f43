"""Distil a hybrid that exists: it keeps norms, feed-forward and ends that are not the teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kimi_convert.config.calibration import DistillRecipe
from kimi_convert.config.progress import ProgressCallback
from kimi_convert.conversion.calibration.calibration_text import CalibrationText
from kimi_convert.conversion.calibration.distill import DistillInput, distill
from kimi_convert.conversion.calibration.ends import Ends, trained_ends
from kimi_convert.conversion.calibration.hybrid import Hybrid, HybridLayer, same_weights
from kimi_convert.conversion.calibration.ranks import Ranks
from kimi_convert.conversion.calibration.realign import aligned_name, mixer_of, parameters_of
from kimi_convert.conversion.calibration.rest import FROZEN, rest_dtypes
from kimi_convert.conversion.calibration.store import CalibrationStore
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.loading import LayerLoader

DISTILLED = "distilled"


def distill_pair(
    teacher: LayerLoader,
    student: LayerLoader,
    text: CalibrationText,
    recipe: DistillRecipe,
    store: CalibrationStore,
    on_progress: ProgressCallback,
    *,
    ranks: Ranks,
    seed: int,
) -> Mapping[str, object]:
    """Train the mixers or all of a hybrid, aligned mixers where the store has them.

    Every rank calls this; the first one stores the result.

    Returns:
        What to note.

    Raises:
        VerificationError: the loss is not finite; the last saved state is kept.
    """
    finished = store.has(DISTILLED)
    ranks.wait()  # else the first may store it before another looks
    if not finished:
        hybrid = _hybrid(teacher, student, store, ranks, trains_all=recipe.trains_all)
        check = text.tokens[len(text.tokens) - text.validation_rows :]
        given = DistillInput(
            tokens=text.training, check=check, teacher=teacher.config, recipe=recipe, seed=seed
        )
        save_distilled(hybrid, store, distill(hybrid, given, store, on_progress))
        ranks.wait()
    return store.record(DISTILLED)


def save_distilled(hybrid: Hybrid, store: CalibrationStore, note: Mapping[str, object]) -> None:
    """Store what was trained, on the first rank; all must call this."""
    parts = (hybrid.ends, *hybrid.layers)
    names = (distilled_name(None), *(distilled_name(n) for n in range(len(hybrid.layers))))
    for name, part in zip(names, parts, strict=True):
        parameters = part.stored()
        if hybrid.ranks.is_first:
            store.save(name, parameters, {})
    if hybrid.ranks.is_first:
        store.save(DISTILLED, {}, note)


def distilled_name(layer_idx: int | None) -> str:
    """Return the store's name of a layer's parameters after distillation; None for the ends."""
    return "distilled-ends" if layer_idx is None else f"distilled-{layer_idx:04d}"


def _hybrid(
    teacher: LayerLoader,
    student: LayerLoader,
    store: CalibrationStore,
    ranks: Ranks,
    *,
    trains_all: bool,
) -> Hybrid:
    def layers() -> Iterator[HybridLayer]:
        for n in range(teacher.config.num_layers):
            theirs, own = teacher.layer(n), student.layer(n)
            parameters = parameters_of(own)
            if store.has(aligned_name(n)):
                device = own.input_norm.weight.device
                stored = store.tensors(aligned_name(n))
                parameters = {name: value.to(device) for name, value in stored.items()}
            mixer = mixer_of(student.config, parameters)
            matrix = parameters[f"{mixer.prefix}o.weight"].float().T
            own.kda = own.mla = None
            dtypes = rest_dtypes(student, own, n) if trains_all else FROZEN
            rest = None if not trains_all and _same_rest(theirs, own) else own
            yield HybridLayer(theirs, mixer, matrix, rest=rest, dtypes=dtypes)

    ends = Ends(teacher.embedding(), teacher.head())
    if trains_all:
        return Hybrid(ends, layers(), own=trained_ends(student), ranks=ranks)
    own = Ends(student.embedding(), student.head())
    same = all(same_weights(*pair) for pair in zip(ends.modules, own.modules, strict=True))
    return Hybrid(ends, layers(), own=None if same else own, ranks=ranks)


def _same_rest(theirs: DecoderLayer, own: DecoderLayer) -> bool:
    """Say whether norms and feed-forward are the same."""
    pairs = (
        (theirs.input_norm, own.input_norm),
        (theirs.mlp_norm, own.mlp_norm),
        (theirs.mlp or theirs.moe, own.mlp or own.moe),
    )
    return all(a is not None and b is not None and same_weights(a, b) for a, b in pairs)
