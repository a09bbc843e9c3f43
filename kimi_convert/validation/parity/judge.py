"""Run what can run, and hold each against the reference that makes the same choices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kimi_convert.errors import UsageError
from kimi_convert.model.numerics import SERVED
from kimi_convert.validation.parity.compare import compare_traces
from kimi_convert.validation.parity.greedy import compare_greedy
from kimi_convert.validation.parity.numerics_of import differing, effective
from kimi_convert.validation.parity.oracles.process import OracleDeclinedError, OracleFailedError
from kimi_convert.validation.parity.pairs import Row, kept_row
from kimi_convert.validation.parity.problem import Problem, Runner
from kimi_convert.validation.parity.references import References
from kimi_convert.validation.parity.report import Absent, ImplementationResult
from kimi_convert.validation.parity.trace import Trace


@dataclass(slots=True)
class Judged:
    """What ran, and what did not."""

    results: list[ImplementationResult] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)  # for pairs, one a result
    absent: list[Absent] = field(default_factory=list)


def run_all(
    runners: Sequence[Runner],
    problem: Problem,
    references: References,
    *,
    asked: Sequence[str],
) -> Judged:
    """Run everything that can run here.

    Args:
        runners: in the order of the report.
        problem: what each is given.
        references: what each is held against.
        asked: names of runners that may not be left out.

    Raises:
        UsageError: one of these cannot run here.
    """
    judged = Judged()
    for runner in runners:
        reason = runner.why_not(problem)
        if reason:
            _leave_out(runner, reason, judged, asked=asked)
            continue
        try:
            _run(runner, problem, references, judged)
        except OracleDeclinedError as error:
            _leave_out(runner, str(error), judged, asked=asked)
        except OracleFailedError as error:
            judged.absent.append(Absent(name=runner.name, why=str(error), failed=True))
    return judged


def _leave_out(runner: Runner, reason: str, judged: Judged, *, asked: Sequence[str]) -> None:
    if runner.name in asked:
        raise UsageError(f"{runner.name} cannot run here", found=reason)
    judged.absent.append(Absent(name=runner.name, why=reason, failed=False))


def _run(runner: Runner, problem: Problem, references: References, judged: Judged) -> None:
    expected = references.trace(runner.numerics)
    started = time.perf_counter()
    for name, trace in runner.run(problem):
        seconds = time.perf_counter() - started
        judged.results.append(_judge(runner, name, trace, problem, references, seconds))
        judged.rows.append(
            kept_row(
                name,
                trace,
                expected,
                numerics=runner.numerics,
                dtype=trace.dtype or runner.dtype,
                config=problem.config,
            )
        )
        started = time.perf_counter()


def _judge(
    runner: Runner,
    name: str,
    trace: Trace,
    problem: Problem,
    references: References,
    seconds: float,
) -> ImplementationResult:
    dtype = trace.dtype or runner.dtype
    comparison = compare_traces(
        trace,
        references.trace(runner.numerics),
        dtype=dtype,
        config=problem.config,
    )
    greedy = None
    if trace.greedy is not None:
        expected = references.greedy(runner.numerics, problem.prompt)
        greedy = compare_greedy(trace.greedy, expected, bound=comparison.bound)
    mine = effective(runner.numerics, problem.config, dtype)
    served = effective(SERVED, problem.config, dtype)
    return ImplementationResult(
        name=name,
        what=runner.what,
        dtype=str(dtype).removeprefix("torch."),
        numerics={f: str(getattr(mine, f)) for f in differing(mine, served)},
        comparison=comparison,
        rerouted=trace.rerouted,
        greedy=greedy,
        seconds=seconds,
    )
