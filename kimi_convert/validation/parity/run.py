"""The same tokens through every implementation: each against the reference, and all in pairs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.bailing_hybrid import BAILING_TYPE
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.errors import ConfigError, UsageError
from kimi_convert.model.numerics import SERVED, Numerics
from kimi_convert.validation.environment import this_environment
from kimi_convert.validation.options import ValidationOptions
from kimi_convert.validation.parity.artifacts import rounded_dtype
from kimi_convert.validation.parity.compare import (
    compare_traces,
)
from kimi_convert.validation.parity.greedy import compare_greedy
from kimi_convert.validation.parity.numerics_of import differing, effective
from kimi_convert.validation.parity.oracles.process import OracleDeclinedError, OracleFailedError
from kimi_convert.validation.parity.pairs import Row, compare_pairs, kept_row
from kimi_convert.validation.parity.problem import Problem, Runner
from kimi_convert.validation.parity.report import (
    Absent,
    ImplementationResult,
    ParityReport,
)
from kimi_convert.validation.parity.runners import (
    REFERENCE,
    RUNNERS,
    artifact_runner,
    graph_runners,
    is_graph,
)
from kimi_convert.validation.parity.spectrum import decay_spectra
from kimi_convert.validation.parity.torch_model import (
    TorchRun,
    continue_greedily,
    trace_checkpoint,
)
from kimi_convert.validation.parity.trace import Greedy, Trace
from kimi_convert.validation.sample import leading_tokens, random_tokens, read_sample

_PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """How much is compared."""

    against: tuple[str, ...] = ()  # names of runners, or the reference's for none; empty for all
    tokens: int = 128  # of each of two sequences
    new_tokens: int = 64  # of the greedy continuation; 0 leaves it out
    seed: int = 0  # of the random tokens that stand in for a text

    def __post_init__(self) -> None:
        """Refuse sizes and names that nothing can run with."""
        for name, least in (("tokens", 2), ("new_tokens", 0)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{name} is not valid",
                    expected=f"at least {least}",
                    found=getattr(self, name),
                )
        known = [REFERENCE, *(runner.name for runner in RUNNERS)]
        unknown = next((name for name in self.against if name not in known), None)
        if unknown is not None:
            raise UsageError(
                "there is no such implementation", expected=", ".join(known), found=repr(unknown)
            )


_DEFAULTS = ParityOptions()


def compare_implementations(
    checkpoint: str | Path,
    artifacts: Sequence[str | Path] = (),
    *,
    text: str | Path | None = None,
    options: ParityOptions = _DEFAULTS,
    on_progress: ProgressCallback = ignore_progress,
) -> ParityReport:
    """Run a checkpoint, and what was written from it, in every implementation, and compare.

    Args:
        checkpoint: a folder of any supported architecture.
        artifacts: folders written from it: other shards, another dtype.
        text: a `.jsonl` or `.txt` file whose first tokens are run; without it, random tokens.
        options: which implementations, on how much.
        on_progress: told of every implementation and layer.

    Raises:
        UsageError: an implementation that was asked for cannot run here.
        ConfigError: a config.json is missing or not valid.
        CheckpointError: a folder is not a readable checkpoint, or an artifact of another model.
        InputError: the text or a tokenizer is not valid.
    """
    checkpoint = Path(checkpoint)
    config = read_config(checkpoint)
    _check_stages_known(config, checkpoint)
    tokens = _tokens(checkpoint, config, text=text, options=options)
    runners = [
        runner
        for path, name in _named([Path(path) for path in artifacts])
        for runner in _artifact_runners(checkpoint, config, path, name=name)
    ]
    runners += [r for r in RUNNERS if not options.against or r.name in options.against]
    references = _References(checkpoint, config, tokens, options, on_progress)
    problem = Problem(
        folder=checkpoint,
        config=config,
        tokens=tokens,
        prompt=tuple(tokens[0, :_PROMPT_TOKENS].tolist()),
        new_tokens=options.new_tokens,
        follow=references.trace,
        on_progress=on_progress,
    )
    results, rows, absent = _run_all(runners, problem, references, asked=options.against)
    return ParityReport(
        checkpoint=str(checkpoint),
        model_type=config.model_type,
        num_layers=config.num_layers,
        kda_layers=config.kda_layers,
        tokens="random" if text is None else "text",
        sequences=tokens.shape[0],
        sequence_length=tokens.shape[1],
        reference=REFERENCE,
        implementations=tuple(results),
        pairs=tuple(compare_pairs([references.row(), *rows], config)),
        absent=tuple(absent),
        decay=decay_spectra(references.trace(SERVED)),
        environment=this_environment(),
    )


def _named(artifacts: Sequence[Path]) -> list[tuple[Path, str]]:
    """Give each artifact the name of its folder, or its path where that is taken."""
    taken = Counter([path.name for path in artifacts] + [r.name for r in RUNNERS] + [REFERENCE])
    return [(path, path.name if taken[path.name] == 1 else str(path)) for path in artifacts]


def _artifact_runners(
    checkpoint: Path, config: ModelConfig, artifact: Path, *, name: str
) -> list[Runner]:
    if is_graph(artifact):
        return graph_runners(artifact, name=name)
    rounded = rounded_dtype(checkpoint, config, artifact)
    return [artifact_runner(artifact, name=name, rounded=rounded)]


def _tokens(
    checkpoint: Path, config: ModelConfig, *, text: str | Path | None, options: ParityOptions
) -> torch.Tensor:
    sizes = ValidationOptions(
        consistency_tokens=options.tokens,
        sequence_length=options.tokens,
        max_tokens=4 * options.tokens,
        seed=options.seed,
    )
    if text is None:
        return random_tokens(config.vocab_size, sizes)
    sample = read_sample(
        Path(text),
        checkpoint=checkpoint,
        teacher=None,
        vocab_size=config.vocab_size,
        options=sizes,
    )
    return leading_tokens(sample, sizes)


def _check_stages_known(config: ModelConfig, checkpoint: Path) -> None:
    """Refuse a model whose gates have no stages in the table."""
    if config.model_type == BAILING_TYPE:
        raise ConfigError(
            "this format is not compared by parity yet",
            where=checkpoint,
            expected="kimi_linear or a teacher of one",
            found=config.model_type,
        )


@dataclass(slots=True)
class _References:
    """The reference under every choice of numerics that some implementation makes."""

    checkpoint: Path
    config: ModelConfig
    tokens: torch.Tensor
    options: ParityOptions
    on_progress: ProgressCallback
    traces: dict[Numerics, Trace] = field(default_factory=dict)
    continuations: dict[Numerics, Greedy] = field(default_factory=dict)

    def trace(self, numerics: Numerics) -> Trace:
        """Run the reference as an implementation with these numerics must."""
        chosen = self._effective(numerics)
        if chosen not in self.traces:
            self.traces[chosen] = trace_checkpoint(
                self.checkpoint,
                self.tokens,
                TorchRun(numerics=chosen),
                label="reference",
                on_progress=self.on_progress,
            )
        return self.traces[chosen]

    def greedy(self, numerics: Numerics, prompt: Sequence[int]) -> Greedy:
        """Continue the prompt with these numerics."""
        chosen = self._effective(numerics)
        if chosen not in self.continuations:
            self.continuations[chosen] = continue_greedily(
                self.checkpoint, prompt, self.options.new_tokens, TorchRun(numerics=chosen)
            )
        return self.continuations[chosen]

    def row(self) -> Row:
        """Return the reference's own logits, as it is served."""
        return kept_row(
            REFERENCE,
            self.trace(SERVED),
            self.trace(SERVED),
            numerics=SERVED,
            dtype=torch.float32,
            config=self.config,
        )

    def _effective(self, numerics: Numerics) -> Numerics:
        return effective(numerics, self.config, torch.float32)


def _run_all(
    runners: Sequence[Runner],
    problem: Problem,
    references: _References,
    *,
    asked: Sequence[str],
) -> tuple[list[ImplementationResult], list[Row], list[Absent]]:
    results: list[ImplementationResult] = []
    rows: list[Row] = []
    absent: list[Absent] = []
    for runner in runners:
        reason = runner.why_not(problem)
        if reason:
            _require_unasked(runner, reason, asked)
            absent.append(Absent(name=runner.name, why=reason, failed=False))
            continue
        expected = references.trace(runner.numerics)
        started = time.perf_counter()
        try:
            for name, trace in runner.run(problem):
                seconds = time.perf_counter() - started
                results.append(_judge(runner, name, trace, problem, references, seconds))
                rows.append(
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
        except OracleDeclinedError as error:
            _require_unasked(runner, str(error), asked)
            absent.append(Absent(name=runner.name, why=str(error), failed=False))
        except OracleFailedError as error:
            absent.append(Absent(name=runner.name, why=str(error), failed=True))
    return results, rows, absent


def _require_unasked(runner: Runner, reason: str, asked: Sequence[str]) -> None:
    """Refuse to leave out what was asked for by its name."""
    if runner.name in asked:
        raise UsageError(f"{runner.name} cannot run here", found=reason)


def _judge(
    runner: Runner,
    name: str,
    trace: Trace,
    problem: Problem,
    references: _References,
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
