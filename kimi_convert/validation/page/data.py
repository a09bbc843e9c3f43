"""Everything that a report shows, as one document: report.json, whose format is docs/formats/report.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from kimi_convert.checkpoints.strict_json import as_object
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import read_config, read_json_object
from kimi_convert.validation.page.memory import MemoryPoint, memory_by_context
from kimi_convert.validation.parity.report import ParityReport
from kimi_convert.validation.report import QualityReport, TextSample, plain

FORMAT = 1
CONVERSION_FILE = "conversion.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One line of the layer map."""

    layer_idx: int
    mixer: str  # "kda" or "mla"
    feed_forward: str  # "dense" or "experts"
    converted: bool  # KDA, and conversion.json says that the source had MLA
    how: str  # the operation that made the mixer's output matrix; empty where nothing says it
    basis: str  # that most heads' queries and keys took, by conversion.json; else empty


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """The document; every chart and table is made of it."""

    name: str  # of the checkpoint's folder
    layers: tuple[LayerRow, ...]
    provenance: Mapping[str, str]  # empty without conversion.json
    memory: tuple[MemoryPoint, ...]
    parity: ParityReport
    text: TextSample | None
    quality: QualityReport | None

    @property
    def passed(self) -> bool:
        """Whether all implementations agree."""
        return self.parity.passed

    def to_json(self) -> dict[str, object]:
        """Return report.json."""
        body = cast("dict[str, object]", plain(self))
        return {"format": FORMAT, "passed": self.passed, **body}


def report_data(
    checkpoint: Path,
    parity: ParityReport,
    *,
    text: TextSample | None = None,
    quality: QualityReport | None = None,
) -> ReportData:
    """Put a report together; conversion.json is read where there is one.

    Raises:
        ConfigError: config.json is missing or not valid.
        CheckpointError: conversion.json is not a JSON object.
    """
    config = read_config(checkpoint)
    record = _conversion(checkpoint)
    return ReportData(
        name=checkpoint.resolve().name,
        layers=tuple(_layer_map(config, record)),
        provenance=_provenance(record),
        memory=memory_by_context(config),
        parity=parity,
        text=text,
        quality=quality,
    )


def _conversion(checkpoint: Path) -> Mapping[str, object]:
    path = checkpoint / CONVERSION_FILE
    return read_json_object(path) if path.is_file() else {}


def _layer_map(config: ModelConfig, record: Mapping[str, object]) -> list[LayerRow]:
    tensors = as_object(record.get("tensors")) or {}
    moe = set(config.moe_layers)
    bases = _bases(record)
    rows: list[LayerRow] = []
    for layer_idx in range(config.num_layers):
        output = as_object(tensors.get(f"model.layers.{layer_idx}.self_attn.o_proj.weight")) or {}
        is_kda = layer_idx in config.kda_layers
        rows.append(
            LayerRow(
                layer_idx=layer_idx,
                mixer="kda" if is_kda else "mla",
                feed_forward="experts" if layer_idx in moe else "dense",
                converted=is_kda and bool(record),
                how=str(output.get("op", "")),
                basis=bases.get(layer_idx, "") if is_kda else "",
            )
        )
    return rows


def _bases(record: Mapping[str, object]) -> dict[int, str]:
    """Return layer -> the basis that most heads took, where a calibration notes it."""
    calibration = as_object(record.get("calibration")) or {}
    layers = calibration.get("layers")
    found: dict[int, str] = {}
    for layer_idx, one in enumerate(
        cast("list[object]", layers) if isinstance(layers, list) else ()
    ):
        counts = as_object((as_object(one) or {}).get("bases")) or {}
        found[layer_idx] = next(iter(counts), "")  # the commonest first
    return found


def _provenance(record: Mapping[str, object]) -> dict[str, str]:
    """Return what conversion.json says of the source, the tool and the recipe, as lines."""
    lines: dict[str, str] = {}
    for part in ("tool", "source"):
        fields = as_object(record.get(part)) or {}
        for name, value in fields.items():
            if isinstance(value, str | int | float):
                lines[f"{part}: {name}"] = str(value)
    recipe = as_object(record.get("recipe")) or {}
    lines |= {f"recipe: {name}": str(value) for name, value in recipe.items()}
    for name in ("tensors", "dropped"):
        held = record.get(name)
        if isinstance(held, dict | list):
            lines[name] = str(len(cast("list[object]", held)))
    calibration = as_object(record.get("calibration"))
    if record:
        lines["fitted to a text"] = "no" if calibration is None else "yes"
    return lines
