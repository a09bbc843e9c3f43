"""What `convert` reads: a folder, a repository fetched before, or one that is fetched as it is read."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kimi_convert.commands.plan import plan_source
from kimi_convert.errors import UsageError

if TYPE_CHECKING:
    from kimi_convert.config.progress import ProgressCallback
    from kimi_convert.config.recipe import Recipe
    from kimi_convert.conversion.runners import Runner
    from kimi_convert.hub import Reference


class Opened(NamedTuple):
    """A folder to convert, what to call it, and what writes from it."""

    folder: Path
    name: Path
    runner: Runner


@contextmanager
def open_whole(
    source: Path, recipe: Recipe, *, limit: int, runner: Runner, on_progress: ProgressCallback
) -> Generator[Opened]:
    """Give the source's folder, fetched if need be.

    What would refuse a repository does so before a weight is fetched.
    """
    from kimi_convert.hub import reference_of
    from kimi_convert.hub.sources import fetch_source

    if reference_of(source) is not None:
        plan_source(source, recipe, limit=limit)
    folder = fetch_source(source, on_progress=on_progress)
    yield Opened(folder, folder, runner)


@contextmanager
def open_streamed(
    source: Path,
    recipe: Recipe,
    *,
    limit: int,  # the conversion plans from the headers, before a weight is fetched
    runner: Runner,
    output: Path,
    on_progress: ProgressCallback,
) -> Generator[Opened]:
    """Give a folder of headers beside the output; its weights come and go as they are read."""
    from kimi_convert.conversion.runners import OneByOne
    from kimi_convert.hub import reference_of
    from kimi_convert.hub.streaming import streamed_source

    reference = _streamable(reference_of(source), recipe, runner)
    with streamed_source(reference, output, on_progress=on_progress) as streamed:
        name = Path(streamed.weights.transfer.snapshot.name)
        yield Opened(streamed.folder, name, OneByOne(streamed.weights))


def _streamable(reference: Reference | None, recipe: Recipe, runner: Runner) -> Reference:
    from kimi_convert.conversion.runners import OneByOne

    if reference is None or recipe.calibration is not None or not isinstance(runner, OneByOne):
        raise UsageError(
            "--discard-source-shards cannot be used here",
            expected="a source by name, --no-text, and one job on this machine",
            hint="A folder is yours and stays as it is; a fit reads its source many times.",
        )
    return reference
