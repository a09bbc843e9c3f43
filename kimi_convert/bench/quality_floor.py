"""What a teacher is worth with mixers replaced by something without a state: the floors.

They are not checkpoints. Kept layers are the teacher's own, RoPE included, so that a floor measures
the replaced mixers alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from kimi_convert.bench.quality_run import LENGTH, TOKENS_PER_KIND, Measured, Setting
from kimi_convert.config.calibration import CalibrationRecipe
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.calibration.calibration_text import calibration_text as read_text
from kimi_convert.conversion.calibration.outcome import Outcome, outcome_of
from kimi_convert.conversion.calibration.ridge import fit_ridge, moments
from kimi_convert.conversion.calibration.streams import advance, batches, groups, make_stream
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.loading import LayerLoader, open_layers
from kimi_convert.model.text import pack_documents, read_documents
from kimi_convert.model.tokenizer import load_tokenizer

# (teacher-forced inputs, their mixer outputs) -> a function of normalised inputs
Floor = Callable[[torch.Tensor, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FloorTexts:
    """Rows of tokens."""

    fit: torch.Tensor  # [N, T]
    check: torch.Tensor  # [n, T + 1]


def _nothing(_: torch.Tensor, outputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    width = outputs.shape[-1]
    return lambda x: x.new_zeros(*x.shape[:-1], width)


def _mean(_: torch.Tensor, outputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    mean = outputs.flatten(0, -2).mean(0)
    return lambda x: mean.expand(*x.shape[:-1], -1)


def _token_by_token(
    inputs: torch.Tensor, outputs: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    parts = [moments(inputs[rows], outputs[rows]) for rows in groups(len(inputs))]
    matrix = fit_ridge(parts).solution
    return lambda x: x @ matrix


OFF = "mixers switched off"
FLOORS: Mapping[str, Floor] = {
    OFF: _nothing,
    "mean output": _mean,
    "token by token, y = B x": _token_by_token,
}


def measure_floors(
    setting: Setting, names: Sequence[str]
) -> Iterator[tuple[str, float, Measured]]:
    """Yield floors in the released pattern by name, with the teacher's loss."""
    if not names:
        return
    config, recipe = read_config(setting.teacher), CalibrationRecipe()
    fit = read_text(setting.calibration, setting.teacher, config, recipe, seed=0)
    texts = FloorTexts(fit=fit.inputs[: recipe.search_rows], check=_held_out(setting))
    kept = Recipe().kept_layers(config.num_layers)
    layers = [n for n in range(config.num_layers) if n not in kept]
    with open_layers(setting.teacher, device=setting.device) as teacher:
        for name in names:
            started = time.monotonic()
            found = measure_floor(teacher, texts, floor=FLOORS[name], layers=layers)
            run = Measured(
                seed=0,
                loss=found.student_loss,
                kl=found.kl,
                top1=found.top1_agreement,
                seconds=time.monotonic() - started,
            )
            yield name, found.teacher_loss, run


def _held_out(setting: Setting) -> torch.Tensor:
    tokenizer = load_tokenizer(setting.teacher)
    return pack_documents(
        read_documents(setting.heldout),
        tokenizer,
        sequence_length=LENGTH,
        separator_id=next(iter(tokenizer.eos_token_ids), None),
        max_tokens=32_768,
        max_tokens_per_kind=TOKENS_PER_KIND,
    ).tokens


@torch.no_grad()
def measure_floor(
    teacher: LayerLoader, texts: FloorTexts, *, floor: Floor, layers: Collection[int]
) -> Outcome:
    """Run a teacher with the mixers of some layers replaced.

    Args:
        teacher: any model.
        texts: what the replacements are fitted to, and what they are judged on.
        floor: makes a replacement.
        layers: which, counted from 0.
    """
    embed = teacher.embedding()
    fit = make_stream(texts.fit, embed, spill=None)
    guide = make_stream(texts.check[:, :-1], embed, spill=None)
    stream = guide.clone()
    for layer_idx in range(teacher.config.num_layers):
        layer = teacher.layer(layer_idx)
        replaced = _replacement(layer, fit, floor) if layer_idx in layers else None
        for rows in batches(len(stream)):
            x = layer.input_norm(stream[rows])
            mixed = layer.mix(stream[rows]) if replaced is None else replaced(x)
            advance(stream, layer, mixed, rows)
            advance(guide, layer, layer.mix(guide[rows]), rows)
        for rows in batches(len(fit)):
            advance(fit, layer, layer.mix(fit[rows]), rows)
    return outcome_of(teacher.head(), guide, stream, texts.check)


def _replacement(
    layer: DecoderLayer, fit: torch.Tensor, floor: Floor
) -> Callable[[torch.Tensor], torch.Tensor]:
    inputs = torch.cat([layer.input_norm(fit[rows]) for rows in batches(len(fit))])
    outputs = torch.cat([layer.mix(fit[rows]) for rows in batches(len(fit))])
    return floor(inputs, outputs)
