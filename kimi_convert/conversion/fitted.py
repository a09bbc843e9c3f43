"""A whole conversion: fit it to text where the recipe says so, then write the hybrid.

Finished layers of the fit lie beside the output, in OUTPUT.calibration, until the output is
complete: after an interrupt the same call goes on from there.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from kimi_convert.checkpoints.clone import Shareable
from kimi_convert.checkpoints.examples import calibration_text as bundled_text
from kimi_convert.checkpoints.output import open_output
from kimi_convert.config.output_format import AS_SOURCE, OutputFormat
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.config.recipe import Recipe, default_recipe
from kimi_convert.conversion import engine
from kimi_convert.conversion.calibration.run import calibrate
from kimi_convert.conversion.engine import ConversionResult
from kimi_convert.conversion.memory import require_memory
from kimi_convert.conversion.plan import DEFAULT_MAX_SHARD_BYTES, plan_conversion
from kimi_convert.conversion.runners import Runner, one_by_one
from kimi_convert.conversion.source_values import check_source_values
from kimi_convert.errors import InputError
from kimi_convert.model.text import read_documents
from kimi_convert.model.tokenizer import load_tokenizer

WORK_SUFFIX = ".calibration"


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    recipe: Recipe | None = None,
    text: str | Path | None = None,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    output_format: OutputFormat = AS_SOURCE,
    resume: bool = False,
    runner: Runner = one_by_one,
    on_progress: ProgressCallback = ignore_progress,
) -> ConversionResult:
    """Convert a checkpoint folder into a Kimi-Linear hybrid in a new or empty folder.

    Args:
        source: config.json and safetensors of a full-attention MLA model.
        output: appears whole or not at all.
        recipe: None for the default: mixers searched and layers chosen on calibration text.
        text: `.jsonl` or `.txt` to calibrate on; None for the text that comes with the package.
        device: where the calibration runs models.
        max_shard_bytes: of each file of weights, its header included.
        output_format: how the result is stored, where not as the source.
        resume: go on from the files that an interrupted run has finished, if there are any.
        runner: what writes the files of weights.
        on_progress: told of every stage.

    Raises:
        ConfigError: the source cannot become a hybrid.
        CheckpointError: the source is not whole, or holds NaN or Inf; nothing is left behind.
        RecipeError: the recipe does not fit the model.
        InputError: the text cannot be used; CalibrationError where there is too little of it.
        OutputError: the output folder is taken, not apart from the source, or holds an
            interrupted run that is not to be resumed or was another conversion.
        ResourceError: the disk is full or cannot be written.
        VerificationError: alignment diverges.
    """
    source, output = Path(source), Path(output)
    recipe = recipe or default_recipe()
    if recipe.calibration is None:
        return engine.convert_checkpoint(
            source,
            output,
            recipe=recipe,
            max_shard_bytes=max_shard_bytes,
            output_format=output_format,
            resume=resume,
            runner=runner,
            on_progress=on_progress,
        )
    text = bundled_text() if text is None else Path(text)
    # Whatever would refuse the source or the writing must refuse it before minutes of fitting.
    plan = plan_conversion(
        source, recipe, max_shard_bytes=max_shard_bytes, output_format=output_format
    )
    runner.check()
    require_memory(plan, workers=runner.workers)
    check_output(
        output, source=source, nbytes=plan.write_bytes, shareable=plan.shareable(), resume=resume
    )
    check_text(text, source)
    check_source_values(plan, on_progress)
    work = work_folder(output)
    with removed_if_refused(work):
        fit = calibrate(
            source, work, recipe=recipe, text=text, device=device, on_progress=on_progress
        )
    result = engine.convert_checkpoint(
        source,
        output,
        recipe=fit.recipe,
        fit=fit,
        max_shard_bytes=max_shard_bytes,
        output_format=output_format,
        resume=resume,
        runner=runner,
        on_progress=on_progress,
    )
    fit.store.remove()
    return result


def work_folder(output: Path) -> Path:
    """Return the folder of finished layers, beside the output."""
    named = output.resolve() if output.name in ("", "..") else output
    return named.with_name(named.name + WORK_SUFFIX)


class _Checked(Exception):  # noqa: N818  (a way out, not an error)
    """Leaves an output folder as it was."""


def check_output(
    output: Path, *, source: Path, nbytes: int, shareable: Shareable, resume: bool = False
) -> None:
    """Refuse, before any work, an output folder that could not be written; leave it as it is."""
    with suppress(_Checked), open_output(output, source=source, resume=resume) as target:
        target.require_space(nbytes - target.resumed_bytes, shareable)
        raise _Checked


def check_text(text: Path, source: Path) -> None:
    """Read one document and the tokenizer: what is plainly wrong shows at once."""
    load_tokenizer(source)
    next(iter(read_documents(text)), None)


@contextmanager
def removed_if_refused(work: Path) -> Generator[None]:
    """Leave no folder of a fit that its input rules out, unless there was one before."""
    existed = work.exists()
    try:
        yield
    except InputError:
        if not existed:
            shutil.rmtree(work, ignore_errors=True)
        raise
