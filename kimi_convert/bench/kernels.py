"""Time our kernels beside torch's and, if installed, flash-linear-attention's, in one run.

    python -m kimi_convert.bench.kernels [--case TEXT] [--json FILE] [--plot FILE]

KDA, the short convolutions and the norms; `--case conv`, say, takes the convolutions alone.

On a GPU every call is timed eagerly and as a replayed CUDA graph, queued behind a sweep of the cache
as `triton.testing.do_bench` does; "idle" is an eager call that finds the GPU without work, so that
what the host does before the last launch counts in full. The first call, with what it compiles, is
timed too. The floor is the time in which a large copy moves as many bytes as the call must move at
least. Without a GPU, plain torch is timed alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch

from kimi_convert.bench.conv_norm_cases import CONV_NORM_CASES, ConvNormCase, conv_norm_peers
from kimi_convert.bench.kernel_cases import CASES as KDA_CASES
from kimi_convert.bench.kernel_cases import Case, make_inputs
from kimi_convert.bench.kernel_peers import Call, peers

CASES: tuple[Case | ConvNormCase, ...] = (*KDA_CASES, *CONV_NORM_CASES)

_REPEATS = 30
_COPY_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds, medians; None where it could not be taken."""

    case: str
    who: str
    first_ms: float
    idle_ms: float
    eager_ms: float
    graph_ms: float | None
    floor_ms: float | None

    @property
    def best_ms(self) -> float:
        """The faster of the two ways to call it."""
        return self.eager_ms if self.graph_ms is None else min(self.eager_ms, self.graph_ms)


def measure(cases: Sequence[Case | ConvNormCase], device: torch.device) -> list[Timing]:
    """Time every implementation on every case."""
    copied_per_ms = _copy_bytes_per_ms(device)
    timings: list[Timing] = []
    for case in cases:
        floor_ms = None if copied_per_ms is None else case.floor_bytes / copied_per_ms
        for who, call in _calls(case, device).items():
            timings.append(_time(case, who, call, floor_ms=floor_ms, device=device))
            sys.stderr.write(_line(timings[-1]) + "\n")
    return timings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_convert.bench.kernels", description="Time the kernels."
    )
    parser.add_argument("--case", default="", help="only cases whose name holds this text")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--plot", type=Path, help="where to draw them; needs matplotlib")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.case in case.name]
    if not cases:
        parser.error(f"no case holds {options.case!r}: {', '.join(case.name for case in CASES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timings = measure(cases, device)
    sys.stdout.write("\n".join((_heading(device), *_table(timings))) + "\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(timing) for timing in timings], indent=2))
    if options.plot:
        _plot(timings, options.plot)
    return 0


def _calls(case: Case | ConvNormCase, device: torch.device) -> Mapping[str, Call]:
    """Return a call for each implementation that serves the case here."""
    if isinstance(case, ConvNormCase):
        return conv_norm_peers(case, device)
    return peers(case, make_inputs(case, device))


def _time(
    case: Case | ConvNormCase,
    who: str,
    call: Call,
    *,
    floor_ms: float | None,
    device: torch.device,
) -> Timing:
    first_ms = _milliseconds(call, device)
    repeats = max(3, min(_REPEATS, int(3000 / max(_milliseconds(call, device), 0.01))))
    idle_ms = statistics.median(_milliseconds(call, device) for _ in range(repeats))
    return Timing(
        case=case.name,
        who=who,
        first_ms=first_ms,
        idle_ms=idle_ms,
        eager_ms=idle_ms if device.type == "cpu" else _queued_ms(call, device, repeats),
        graph_ms=_graph_ms(call, device, repeats),
        floor_ms=floor_ms,
    )


def _milliseconds(call: Call, device: torch.device) -> float:
    """Time one call that finds nothing queued before it."""
    if device.type == "cpu":
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3
    _sweep(device)
    torch.cuda.synchronize(device)
    started_at, ended_at = _recorded(call)
    torch.cuda.synchronize(device)
    return started_at.elapsed_time(ended_at)


def _queued_ms(call: Call, device: torch.device, repeats: int) -> float:
    """Return the median of calls that are queued one after another, with a sweep before each."""
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(repeats):
        _sweep(device)
        events.append(_recorded(call))
    torch.cuda.synchronize(device)
    return statistics.median(before.elapsed_time(after) for before, after in events)


def _recorded(call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    started_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started_at.record()
    call()
    ended_at.record()
    return started_at, ended_at


def _sweep(device: torch.device) -> None:
    """Fill the cache, so that no call finds the inputs of the one before in it."""
    torch.empty(2**28, dtype=torch.int8, device=device).zero_()


def _graph_ms(call: Call, device: torch.device, repeats: int) -> float | None:
    """Time replays of the call as a CUDA graph; None without a GPU, or if it cannot be captured."""
    if device.type == "cpu":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return None
    return _queued_ms(graph.replay, device, repeats)


def _copy_bytes_per_ms(device: torch.device) -> float | None:
    """Return what a large copy moves, bytes read and written, in a millisecond; None on a CPU."""
    if device.type == "cpu":
        return None
    source = torch.ones(_COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _queued_ms(lambda: target.copy_(source), device, _REPEATS)


def _heading(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}; milliseconds, medians"


def _table(timings: Sequence[Timing]) -> list[str]:
    """Return a line for each timing, with its ratio to ours, or to the first of its case."""
    lines: list[str] = []
    for timing in timings:
        of_case = [other for other in timings if other.case == timing.case]
        base = next((other for other in of_case if other.who == "ours"), of_case[0])
        lines.append(f"{_line(timing)}  x{timing.best_ms / base.best_ms:.2f}")
    return lines


def _line(timing: Timing) -> str:
    graph = "-" if timing.graph_ms is None else f"{timing.graph_ms:.3f}"
    floor = "-" if timing.floor_ms is None else f"{timing.floor_ms:.3f}"
    return (
        f"{timing.case:42} {timing.who:6} first {timing.first_ms:9.1f}"
        f"  idle {timing.idle_ms:9.3f}  eager {timing.eager_ms:9.3f}"
        f"  graph {graph:>9}  floor {floor:>7}"
    )


def _plot(timings: Sequence[Timing], path: Path) -> None:
    # matplotlib is an extra.
    figure = import_module("matplotlib.figure").Figure(
        figsize=(9, 1 + 0.35 * len(timings)), layout="constrained"
    )
    axes = figure.subplots()
    labels = [f"{timing.case}  {timing.who}" for timing in timings]
    axes.barh(labels, [timing.best_ms for timing in timings])
    axes.set_xscale("log")
    axes.set_xlabel("ms")
    axes.invert_yaxis()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
