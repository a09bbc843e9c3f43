"""Naming tables and the small engine that reads them: which tensors a checkpoint must hold.

A table is data: one `Name` row per kind of tensor, with templates for layer and expert numbers
and symbolic axes. `expand` turns it into one `Entry` per tensor before a byte is read; `match`
holds the entries against what is there. This module knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from string import Formatter
from typing import Protocol

from kimi_convert.checkpoints.messages import listed, quoted
from kimi_convert.errors import CheckpointError, MappingError

_COMPARED = 1000  # unknown names that are searched for one close to what is missing


class Storage(StrEnum):
    """Which dtypes a tensor may be stored in."""

    WEIGHT = "weight"  # the checkpoint's dtype
    FP32 = "fp32"  # written in fp32 whatever the rest is; read in any floating dtype


@dataclass(frozen=True, slots=True)
class Name:
    """One row of a naming table: our parameter, the checkpoint's name and the shape.

    Templates may hold `{layer}` and `{expert}`. `where` names a set of layers; a row without
    `{layer}` exists if its set is not empty. `aliases` are names that other writers use.
    """

    param: str
    checkpoint: str
    shape: tuple[str, ...]
    where: str = "all"
    storage: Storage = Storage.WEIGHT
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """Tensors that a checkpoint may hold and that nothing reads, and why."""

    checkpoint: str
    why: str
    where: str = "all"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that must exist."""

    param: str
    template: str  # the row's `param` template
    name: str  # in the checkpoint
    shape: tuple[int, ...]
    storage: Storage
    layer_idx: int | None
    expert_idx: int | None
    aliases: tuple[str, ...]

    def fill(self, template: str) -> str:
        """Fill another template with this tensor's layer and expert."""
        return template.format(layer=self.layer_idx, expert=self.expert_idx)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The numbers that templates are filled with: layer sets, experts, axis sizes."""

    layers: Mapping[str, Sequence[int]]
    num_experts: int
    axes: Mapping[str, int]


class StoredTensor(Protocol):
    """What `match` needs to know of a tensor that is there."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Dropped:
    """One tensor that is there and that nothing reads."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Match:
    """Every expected tensor's stored name, and what is left out with its reason."""

    entries: tuple[Entry, ...]
    stored_names: Mapping[str, str]  # parameter -> name in the checkpoint
    dropped: tuple[Dropped, ...]


def expand(names: Iterable[Name], layout: Layout) -> tuple[Entry, ...]:
    """Turn a table into one entry per tensor, in the order of layers, then rows.

    Raises:
        MappingError: two rows give the same parameter or the same checkpoint name, aliases
            included.
    """
    entries = tuple(entry for row in names for entry in _expand_row(row, layout))
    _refuse_twice("param", (entry.param for entry in entries))
    _refuse_twice("name", (name for entry in entries for name in (entry.name, *entry.aliases)))
    return entries


def count_kinds(
    names: Iterable[Name], layout: Layout
) -> Iterator[tuple[Name, tuple[int, ...], int]]:
    """Give each row of a table with its shape and how many tensors it stands for."""
    for row in names:
        count = sum(1 for _ in places(row.param, row.where, layout))
        yield row, tuple(layout.axes[axis] for axis in row.shape), count


def expand_drops(drops: Iterable[Drop], layout: Layout) -> dict[str, str]:
    """Return the reason for every name that may be dropped."""
    return {
        drop.checkpoint.format(layer=layer_idx, expert=expert_idx): drop.why
        for drop in drops
        for layer_idx, expert_idx in places(drop.checkpoint, drop.where, layout)
    }


def match(
    entries: Sequence[Entry],
    stored: Iterable[StoredTensor],
    *,
    droppable: Mapping[str, str],
    dtypes: Iterable[str],
    where: object,
) -> Match:
    """Hold a checkpoint against what it must be.

    Args:
        entries: every tensor that must exist.
        stored: every tensor that is there.
        droppable: names that may be there unread, with the reason.
        dtypes: the safetensors dtypes that count as weights.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: tensors are missing or unknown, all counted and the first few named; or
            one is there under two of its names, of the wrong shape or of a dtype that is not a
            plain weight.
    """
    there = {tensor.name: tensor for tensor in stored}
    stored_names: dict[str, str] = {}
    missing: list[str] = []
    for entry in entries:
        found = [name for name in (entry.name, *entry.aliases) if name in there]
        if len(found) > 1:
            raise _stored_twice(found, where)
        if found:
            stored_names[entry.param] = found[0]
        else:
            missing.append(entry.name)
    read = set(stored_names.values())
    unread = [name for name in there if name not in read]
    unknown = [name for name in unread if name not in droppable]
    if missing or unknown:
        raise _uncovered(missing, unknown, where)
    allowed = frozenset(dtypes)
    for entry in entries:
        _check_tensor(entry, there[stored_names[entry.param]], allowed, where)
    dropped = tuple(Dropped(name, droppable[name]) for name in sorted(unread))
    return Match(tuple(entries), stored_names, dropped)


def _expand_row(row: Name, layout: Layout) -> Iterator[Entry]:
    shape = tuple(layout.axes[axis] for axis in row.shape)
    for layer_idx, expert_idx in places(row.param, row.where, layout):
        yield Entry(
            param=row.param.format(layer=layer_idx, expert=expert_idx),
            template=row.param,
            name=row.checkpoint.format(layer=layer_idx, expert=expert_idx),
            shape=shape,
            storage=row.storage,
            layer_idx=layer_idx,
            expert_idx=expert_idx,
            aliases=tuple(
                alias.format(layer=layer_idx, expert=expert_idx) for alias in row.aliases
            ),
        )


def _refuse_twice(what: str, texts: Iterable[str]) -> None:
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise MappingError(f"two table rows give the {what} {text!r}")
        seen.add(text)


def holes(template: str) -> frozenset[str]:
    """Return the names of a template's holes, such as `layer`."""
    return frozenset(hole for _, hole, _, _ in Formatter().parse(template) if hole)


def places(template: str, where: str, layout: Layout) -> Iterator[tuple[int | None, int | None]]:
    """Give every layer of a set with every expert; None for what the template does not ask."""
    asked = holes(template)
    layers = layout.layers[where]
    if not layers:
        return
    experts = range(layout.num_experts) if "expert" in asked else (None,)
    for layer_idx in layers if "layer" in asked else (None,):
        for expert_idx in experts:
            yield layer_idx, expert_idx


def _uncovered(missing: list[str], unknown: list[str], where: object) -> CheckpointError:
    parts: list[str] = []
    if missing:
        parts.append(f"{len(missing)} missing: {listed(missing)}")
    if unknown:
        parts.append(f"{len(unknown)} unknown: {listed(unknown)}")
    near = get_close_matches(missing[0], unknown[:_COMPARED], 1) if missing else []
    return CheckpointError(
        "checkpoint does not hold the tensors that its config.json asks for",
        where=where,
        expected="every tensor of the architecture and no other",
        found="; ".join(parts),
        hint=f"Is {quoted(near[0])} meant to be {missing[0]!r}?"
        if near
        else "Download the checkpoint again, or check that config.json belongs to it.",
    )


def _stored_twice(names: Sequence[str], where: object) -> CheckpointError:
    return CheckpointError(
        "checkpoint holds one tensor under two names",
        where=where,
        expected="one of them",
        found=listed(names),
        hint="Other programs may read the other one: remove the one that is not meant.",
    )


def _check_tensor(
    entry: Entry, tensor: StoredTensor, allowed: frozenset[str], where: object
) -> None:
    if tensor.shape != entry.shape:
        raise CheckpointError(
            f"tensor {quoted(tensor.name)} has the wrong shape",
            where=where,
            expected=list(entry.shape),
            found=list(tensor.shape),
            hint="The shape follows from config.json; one of the two is wrong.",
        )
    if tensor.dtype not in allowed:
        raise CheckpointError(
            f"tensor {quoted(tensor.name)} has a dtype that is not a plain weight",
            where=where,
            expected=", ".join(sorted(allowed)),
            found=tensor.dtype,
            hint="If it is quantised, config.json must say how, in quantization_config.",
        )
