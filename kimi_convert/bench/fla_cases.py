"""Run the parameter sets of flash-linear-attention's tests of KDA through our functions.

    python -m kimi_convert.bench.fla_cases [--case TEXT] [--without-fla] [--json FILE]

Each set is run behind FLA's signatures and compared with a recurrence in fp64 of our own, under the
bounds that FLA's tests have for it; where flash-linear-attention is installed, its functions are run
beside ours (its first call of every shape takes long). Exit code 6 if a result of ours is beyond
its bound. Needs a GPU; with TRITON_INTERPRET=1 the kernels run on a CPU, in minutes to hours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from kimi_convert.bench.fla_case import FlaCase
from kimi_convert.bench.fla_parameters import FLA_CASES
from kimi_convert.bench.fla_run import FLA, OURS, Comparison, run_case
from kimi_convert.errors import KimiConvertError, VerificationError
from kimi_convert.kernels.backend import Backend, resolve_backend

CASES = FLA_CASES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_convert.bench.fla_cases",
        description="Run the parameter sets of flash-linear-attention's tests of KDA.",
    )
    parser.add_argument("--case", default="", help="only cases whose name holds this text")
    parser.add_argument("--without-fla", action="store_true", help="leave its own functions out")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.case in case.name]
    if not cases:
        parser.error(f"no case holds {options.case!r}: {', '.join(case.name for case in CASES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolve_backend(Backend.TRITON, where="fla_cases", device=device, dtype=torch.float32)
    except KimiConvertError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    with_fla = bool(find_spec("fla")) and not options.without_fla
    sys.stdout.write(f"{_heading(device)}\n")
    found = [row for case in cases for row in _run(case, device, with_fla=with_fla)]
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=2))
    missed = [row for row in found if row.counts and not row.passed]
    sys.stdout.write(_verdict(len(cases), found, missed) + "\n")
    return VerificationError.exit_code if missed else 0


def _run(case: FlaCase, device: torch.device, *, with_fla: bool) -> list[Comparison]:
    """Run one case and print its lines."""
    rows = run_case(case, device, with_fla=with_fla)
    sys.stdout.write("\n".join((case.name, *_lines(rows))) + "\n")
    sys.stdout.flush()
    return rows


def _lines(rows: Iterable[Comparison]) -> Iterable[str]:
    """Yield a line for each implementation and what it is compared with."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for row in rows:
        groups.setdefault((row.who, row.against), []).append(row)
    for (who, against), group in groups.items():
        cells = [f"{row.result} {row.error:.1e}{_mark(row)}" for row in group]
        yield f"  {who:6} {against:4}  {'  '.join(cells)}"


def _mark(row: Comparison) -> str:
    if row.passed:
        return ""
    return f" (> {row.allowed:.1e})" if row.counts else f" [> {row.allowed:.1e}]"


def _heading(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted"
    return f"{name}, torch {torch.__version__}; root mean square errors, relative"


def _verdict(num_cases: int, found: Sequence[Comparison], missed: Sequence[Comparison]) -> str:
    counted = sum(row.counts for row in found)
    uncounted = sum(not row.passed and not row.counts for row in found)
    said = f"{num_cases} cases, {counted} results of {OURS}: {counted - len(missed)} within bounds"
    if uncounted:
        said += f"; not counted: {uncounted} of {FLA} or where FLA's tests only warn"
    if missed:
        said += "; missed: " + ", ".join(f"{row.case} {row.result}" for row in missed)
    return said


if __name__ == "__main__":
    sys.exit(main())
