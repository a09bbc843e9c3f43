"""How the report of a calibration reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kimi_convert.commands._numbers import layers_text
from kimi_convert.commands._quality import probes_table
from kimi_convert.commands._report import Facts, Report, Sentence, Table

if TYPE_CHECKING:
    from kimi_convert.conversion.calibration.report import CalibrationReport

_SHOWN_SETS = 4
_LAYER_COLUMNS = (
    "layer",
    "mixer",
    "as KDA",
    "as MLA",
    "error",
    "cosine",
    "norm",
    "stream",
    "experts in common",
)
_HEAD_COLUMNS = ("layer", "best", "worst", "half-life", "write strength", "below eps", "basis")


def fit_report(fit: CalibrationReport) -> Report:
    """Return what a calibration found, and what it chose by."""
    probes = (probes_table(fit.probes, of="hybrid"),) if fit.probes else ()
    return (_validation(fit), *probes, _layers(fit), _heads(fit), *_kept(fit), *_warnings(fit))


def _validation(fit: CalibrationReport) -> Facts:
    outcome = fit.validation
    return Facts(
        f"On {outcome.tokens} tokens of {fit.text_name} that fitted nothing",
        (
            ("loss of the teacher", f"{outcome.teacher_loss:.4f} nats per token"),
            ("loss of the hybrid", f"{outcome.student_loss:.4f}"),
            ("KL to the teacher", f"{outcome.kl:.4f}"),
            *(
                (f"after {before} tokens", f"{max(kl, 0.0):.4f}")
                for before, kl in outcome.kl_by_position.items()
            ),
            ("top-1 agreement", f"{outcome.top1_agreement:.1%}"),
        ),
    )


def _layers(fit: CalibrationReport) -> Table:
    rows = tuple(
        (
            str(layer.layer_idx),
            layer.mixer.upper(),
            f"{max(layer.kl_as_kda, 0.0):.4f}",  # rounding can leave it below 0
            f"{max(layer.kl_as_mla, 0.0):.4f}",
            f"{layer.error:.3f}",
            f"{layer.cosine:.3f}",
            f"{layer.norm_ratio:.3f}",
            f"{layer.stream_error:.4f}",
            "-" if layer.router_agreement is None else f"{layer.router_agreement:.1%}",
        )
        for layer in fit.layers
    )
    return Table(
        "Layers, counted from 0: what each alone would cost in KL, its distance from its target as "
        "it is now, what is left in the stream",
        _LAYER_COLUMNS,
        rows,
        right=("layer", *_LAYER_COLUMNS[2:]),
    )


def _heads(fit: CalibrationReport) -> Table:
    rows = tuple(
        (
            str(layer.layer_idx),
            f"{min(layer.head_errors):.3f}",
            f"{max(layer.head_errors):.3f}",
            "" if layer.half_life is None else f"{layer.half_life:.3g}",
            "" if layer.beta is None else f"{layer.beta:.2f}",
            "" if layer.eps_share is None else f"{layer.eps_share:.1%}",
            next(iter(layer.bases), "") if layer.mixer == "kda" else "",
        )
        for layer in fit.layers
    )
    return Table(
        "Heads: error of the teacher's best and worst read from the same head alone, half-life in "
        "tokens, outputs below the eps of their norm, commonest basis",
        _HEAD_COLUMNS,
        rows,
        right=_HEAD_COLUMNS[:-1],
    )


def _kept(fit: CalibrationReport) -> Report:
    """Show the released pattern, the kept set and the best of the others."""
    if len(fit.compared) < 2:
        return ()
    released, *others = fit.compared
    others.sort(key=lambda one: (one.kept != fit.kept, one.kl))
    best = others[: _SHOWN_SETS - 1]
    rows = tuple(
        (
            layers_text(one.kept) + (", released pattern" if one is released else ""),
            f"{one.kl:.4f}",
            f"{one.chance:.4f}",
            str(one.longest_run),
            "kept" if one.kept == fit.kept else "",
        )
        for one in sorted((released, *best), key=lambda one: one.kl)
    )
    return (
        Table(
            "Layers that could stay MLA, by the KL of a first student",
            ("layers", "KL", "chance", "KDA in a row", ""),
            rows,
            right=("KL", "chance", "KDA in a row"),
        ),
        *_by_chance(fit),
        *_at_length(fit),
    )


def _by_chance(fit: CalibrationReport) -> Report:
    """Say why another set than the first is kept."""
    first = min(fit.compared, key=lambda one: one.kl)
    kept = next(one for one in fit.compared if one.kept == fit.kept)
    if kept is first or kept.kl - first.kl > kept.chance:
        return ()
    return (
        Sentence(
            "Chance could have put the first of these there; of those that it cannot be told from,"
            " the one nearest to the released pattern is kept."
        ),
    )


def _at_length(fit: CalibrationReport) -> Report:
    """Say how the choice does at longer contexts."""
    if fit.long_context is None:
        return ()
    sets = " and ".join(
        f"{kl:.4f} where {layers_text(kept)} stay" for kept, kl in fit.long_context.kl_of.items()
    )
    released = next(iter(fit.long_context.kl_of))
    verdict = "the choice is overturned" if fit.kept == released else "the choice holds"
    return (
        Sentence(
            f"At {fit.long_context.length} tokens, in the last half, the KL is {sets}: {verdict}."
        ),
    )


def _warnings(fit: CalibrationReport) -> Report:
    fallen = [layer for layer in fit.layers if layer.output != "solved"]
    return tuple(
        Sentence(
            f"Layer {layer.layer_idx}: the solved output did harm on validation tokens; "
            f"{layer.output} instead.",
            warns=True,
        )
        for layer in fallen
    )
