"""Draw one layer of an exported graph as SVG, from the file itself.

    python -m kimi_convert.exporters.onnx.picture MODEL LAYER OUTPUT [--mixer kda]

A box is a chain of nodes of which each has the next as its only reader; what a node reads of weights
stands beside it. Constants, and what is computed from the number of tokens alone, are left out. Boxes
stand below all that they read.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import onnx

from kimi_convert.checkpoints.disk import disk_errors
from kimi_convert.errors import CheckpointError, KimiConvertError

_STATES = ("past_key_values.", "present.")
_BOX_WIDTH, _LINE_HEIGHT, _PADDING = 186, 16, 7
_GAP_X, _GAP_Y, _MARGIN = 18, 34, 20
_PORT_GAP = 16  # between the inputs of a box
_SWEEPS = 8  # over the ranks, to bring boxes near what they read
_COLOURS = {"": "#eef2f7", "com.microsoft": "#fde9c8", "ai.kimi": "#d9f0d9", "state": "#e3dcf5"}
# Operators of the standard that stand for the same as those of the other domains.
_KDA = ("LinearAttention", "CausalConvWithState")


@dataclass(slots=True, eq=False)
class _Box:
    """What is drawn as one rectangle."""

    lines: list[str]
    colour: str
    reads: list[int] = field(default_factory=list)  # boxes
    rank: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def height(self) -> int:
        return _LINE_HEIGHT * len(self.lines) + 2 * _PADDING


def draw_layer(model: Path, layer_idx: int, *, mixer: str = "kda") -> str:
    """Return one layer's mixer as an SVG document.

    Args:
        model: a file that `export onnx` wrote; its weights are not read.
        layer_idx: counted from 0.
        mixer: "kda" or "mla".

    Raises:
        CheckpointError: the file is no ONNX graph, or has no such layer.
    """
    try:
        graph = onnx.load(model, load_external_data=False).graph
    except Exception as error:
        raise CheckpointError("not an ONNX file", where=model, found=error) from error
    prefix = f"layers.{layer_idx}.{mixer}."
    nodes = [node for node in graph.node if node.name.startswith(prefix)]
    if not nodes:
        raise CheckpointError(f"the graph has no {mixer} mixer in layer {layer_idx}", where=model)
    weights = {t.name for t in graph.initializer if t.external_data}
    constants = {t.name for t in graph.initializer} - weights
    collected = _Boxes(nodes, prefix, weights)
    for node in nodes:
        collected.add(node, constants)
    _place(collected.boxes)
    return _svg(collected.boxes, title=f"{mixer.upper()} mixer of layer {layer_idx}, {model.name}")


class _Boxes:
    """Collects the boxes of nodes, and of the inputs and outputs of the layer."""

    def __init__(
        self, nodes: Sequence[onnx.NodeProto], prefix: str, weights: AbstractSet[str]
    ) -> None:
        """Take the nodes of one layer, in their order."""
        self.boxes: list[_Box] = []
        self._prefix = prefix
        self._weights = weights
        self._made: dict[str, int] = {}  # value -> box that gives it
        self._readers = Counter(name for node in nodes for name in node.input)
        several = (node.output for node in nodes if len(node.output) > 1)
        self._parts = {name for outputs in several for name in outputs}

    def add(self, node: onnx.NodeProto, ignored: AbstractSet[str]) -> None:
        """Add a node, unless it computes nothing but a shape."""
        inputs = [name for name in node.input if name and name not in ignored]
        held = [name for name in inputs if name in self._weights]
        data = [name for name in inputs if name not in self._weights and self._is_data(name)]
        if not data and not held:
            return
        for name in data:
            if name not in self._made:
                self._made[name] = len(self.boxes)
                self.boxes.append(_Box([_shown(name, self._prefix)], _COLOURS["state"]))
        box = self._box_of(node, data)
        box.lines += self._lines(node, held)
        self._made |= dict.fromkeys(filter(None, node.output), self.boxes.index(box))
        states = (name for name in node.output if name.startswith(_STATES))
        at = self._made[node.output[0]]
        self.boxes += [_Box([name], _COLOURS["state"], [at]) for name in states]

    def _box_of(self, node: onnx.NodeProto, data: Sequence[str]) -> _Box:
        """Return the box that a node continues, or a new one."""
        alone = len(data) == 1 and self._readers[data[0]] == 1 and data[0] not in self._parts
        if alone and _is_plain(node, self.boxes[self._made[data[0]]]):
            return self.boxes[self._made[data[0]]]
        self.boxes.append(_Box([], _colour(node), [self._made[name] for name in data]))
        return self.boxes[-1]

    def _lines(self, node: onnx.NodeProto, held: Sequence[str]) -> list[str]:
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        shown = [_shown(name, self._prefix) for name in held]
        return [f"{operator} {shown[0]}"] if len(shown) == 1 else [operator, *shown]

    def _is_data(self, name: str) -> bool:
        """Tell values from shapes: what comes from outside is hidden rows, a mask or a state."""
        outside = not name.startswith((self._prefix, "tokens.batch_and_tokens"))
        return name in self._made or outside


def _is_plain(node: onnx.NodeProto, box: _Box) -> bool:
    """Tell whether a node and the box before it are both of the standard's simple operators."""
    return {box.colour, _colour(node)} == {_COLOURS[""]}


def _colour(node: onnx.NodeProto) -> str:
    if not node.domain and node.op_type in _KDA:
        return _COLOURS["com.microsoft"]
    return _COLOURS[node.domain]


def _shown(name: str, prefix: str) -> str:
    """Return a name without what all names of the layer begin with."""
    short = name.removeprefix(prefix).removeprefix(prefix.rsplit(".", 2)[0] + ".")
    return short.rsplit("self_attn.", 1)[-1]


def _place(boxes: Sequence[_Box]) -> None:
    """Give every box a rank below what it reads, then an order within the rank, then a place."""
    for box in boxes:
        box.rank = 1 + max((boxes[read].rank for read in box.reads), default=-1)
    _lower_sources(boxes)
    ranks = [[box for box in boxes if box.rank == rank] for rank in range(_last_rank(boxes) + 1)]
    readers = {
        id(box): [other for other in boxes if boxes.index(box) in other.reads] for box in boxes
    }
    for rank in ranks:
        _spread(rank)
    for sweep in range(_SWEEPS):
        for rank in ranks if sweep % 2 == 0 else reversed(ranks):
            near = {
                id(box): [boxes[read] for read in box.reads]
                if sweep % 2 == 0
                else readers[id(box)]
                for box in rank
            }
            rank.sort(key=lambda box: _mean([other.x for other in near[id(box)]], box.x))
            _spread(rank)
    top = float(_MARGIN)
    for rank in ranks:
        for box in rank:
            box.y = top
        top += max(box.height for box in rank) + _GAP_Y


def _lower_sources(boxes: Sequence[_Box]) -> None:
    """Let what reads nothing stand right above its first reader."""
    for number, box in enumerate(boxes):
        first = min((b.rank for b in boxes if number in b.reads), default=box.rank + 1)
        if not box.reads:
            box.rank = first - 1


def _last_rank(boxes: Sequence[_Box]) -> int:
    return max(box.rank for box in boxes)


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _spread(rank: Sequence[_Box]) -> None:
    """Put the boxes of a rank side by side around the middle."""
    step = _BOX_WIDTH + _GAP_X
    for number, box in enumerate(rank):
        box.x = (number - (len(rank) - 1) / 2) * step


def _svg(boxes: Sequence[_Box], *, title: str) -> str:
    left = min(box.x for box in boxes) - _BOX_WIDTH / 2 - _MARGIN
    width = max(box.x for box in boxes) + _BOX_WIDTH / 2 + _MARGIN - left
    height = max(box.y + box.height for box in boxes) + _MARGIN
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.0f} 0 {width:.0f} {height:.0f}"'
        ' font-family="sans-serif" font-size="11" text-anchor="middle">'
    )
    lines = [
        opening,
        f"<title>{escape(title)}</title>",
        f'<rect x="{left:.0f}" width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        *(_edge(boxes[read], box, at) for box in boxes for at, read in enumerate(box.reads)),
        *(line for box in boxes for line in _rectangle(box)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _edge(start: _Box, end: _Box, at: int) -> str:
    """Draw a line from the bottom of one box to the top of another, inputs from left to right."""
    y1, y2 = start.y + start.height, end.y
    x1, x2 = start.x, end.x + _PORT_GAP * (at - (len(end.reads) - 1) / 2)
    bend = (y2 - y1) / 2
    return (
        f'<path d="M{x1:.0f} {y1:.0f} C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f}'
        f' {x2:.0f} {y2:.0f}" fill="none" stroke="#7a8899"/>'
    )


def _rectangle(box: _Box) -> Iterable[str]:
    yield (
        f'<rect x="{box.x - _BOX_WIDTH / 2:.0f}" y="{box.y:.0f}" width="{_BOX_WIDTH}"'
        f' height="{box.height}" rx="5" fill="{box.colour}" stroke="#55606e"/>'
    )
    for number, line in enumerate(box.lines):
        y = box.y + _PADDING + _LINE_HEIGHT * (number + 0.75)
        yield f'<text x="{box.x:.0f}" y="{y:.0f}">{escape(line)}</text>'


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one layer; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_convert.exporters.onnx.picture",
        description="Draw one layer of an exported graph as SVG.",
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("layer", type=int, help="counted from 0")
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--mixer", choices=("kda", "mla"), default="kda")
    options = parser.parse_args(arguments)
    try:
        drawn = draw_layer(options.model, options.layer, mixer=options.mixer)
        with disk_errors(options.output, doing="write the picture"):
            options.output.write_text(drawn, encoding="utf-8")
    except KimiConvertError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
