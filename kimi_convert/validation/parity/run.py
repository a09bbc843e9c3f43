"""The same tokens through every implementation: each against the reference, and all in pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.bailing_hybrid import BAILING_TYPE
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.errors import ConfigError, UsageError
from kimi_convert.model.numerics import SERVED
from kimi_convert.validation.environment import this_environment
from kimi_convert.validation.options import ValidationOptions
from kimi_convert.validation.parity.artifacts import rounded_dtype
from kimi_convert.validation.parity.judge import run_all
from kimi_convert.validation.parity.pairs import compare_pairs
from kimi_convert.validation.parity.problem import Problem, Runner
from kimi_convert.validation.parity.references import REFERENCE, References
from kimi_convert.validation.parity.report import ParityReport
from kimi_convert.validation.parity.runners import (
    RUNNERS,
    artifact_runner,
    graph_runners,
    is_graph,
)
from kimi_convert.validation.parity.spectrum import decay_spectra
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
    references = References(checkpoint, config, tokens, options.new_tokens, on_progress)
    problem = Problem(
        folder=checkpoint,
        config=config,
        tokens=tokens,
        prompt=tuple(tokens[0, :_PROMPT_TOKENS].tolist()),
        new_tokens=options.new_tokens,
        follow=references.trace,
        on_progress=on_progress,
    )
    judged = run_all(runners, problem, references, asked=options.against)
    return ParityReport(
        checkpoint=str(checkpoint),
        model_type=config.model_type,
        num_layers=config.num_layers,
        kda_layers=config.kda_layers,
        tokens="random" if text is None else "text",
        sequences=tokens.shape[0],
        sequence_length=tokens.shape[1],
        reference=REFERENCE,
        implementations=tuple(judged.results),
        pairs=tuple(compare_pairs([references.row(), *judged.rows], config)),
        absent=tuple(judged.absent),
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
