"""A report's folder: report.json, report.html and a PNG per chart; it appears whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from kimi_convert.checkpoints.output import Output, open_output
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.errors import UsageError, VerificationError
from kimi_convert.validation.greedy import measure_greedy
from kimi_convert.validation.memory_need import too_large
from kimi_convert.validation.options import ValidationOptions
from kimi_convert.validation.page.charts import charts_of
from kimi_convert.validation.page.data import ReportData, report_data
from kimi_convert.validation.page.html import page_of
from kimi_convert.validation.parity.report import ParityReport
from kimi_convert.validation.parity.run import ParityOptions, compare_implementations
from kimi_convert.validation.quality import measure_quality
from kimi_convert.validation.report import QualityReport, TextSample
from kimi_convert.validation.sample import check_comparable, read_sample

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
_DEFAULTS = ParityOptions()


def compare_and_report(
    checkpoint: str | Path,
    artifacts: Sequence[str | Path] = (),
    *,
    folder: str | Path,
    text: str | Path | None = None,
    teacher: str | Path | None = None,
    options: ParityOptions = _DEFAULTS,
    quality: ValidationOptions | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> ParityReport:
    """Compare implementations, and write a report into a new or empty folder.

    Args:
        checkpoint: as in `compare_implementations`, like the arguments that are not named here.
        artifacts: folders written from it.
        folder: the report's.
        text: with it, loss by position is measured.
        teacher: the checkpoint that it was made from; with a text, KL to it is measured.
        options: which implementations, on how much.
        quality: how much of the text is measured on.
        on_progress: told of everything.

    Raises:
        UsageError: matplotlib is not installed, or there is a teacher without a text.
        OutputError: the folder is taken, or not apart from the checkpoint.
        KimiConvertError: whatever `compare_implementations` and `read_sample` raise.
    """
    _require_plots()
    if teacher is not None and text is None:
        raise UsageError("a teacher is compared on a text", expected="--text", found="none")
    checkpoint = Path(checkpoint)
    if teacher is not None:
        check_comparable(read_config(checkpoint), read_config(Path(teacher)), where=teacher)
    with open_output(folder, source=checkpoint) as output:
        parity = compare_implementations(
            checkpoint, artifacts, text=text, options=options, on_progress=on_progress
        )
        facts, measured = _measure(
            checkpoint,
            None if text is None else Path(text),
            None if teacher is None else Path(teacher),
            options=quality or ValidationOptions(),
            on_progress=on_progress,
        )
        data = report_data(checkpoint, parity, text=facts, quality=measured)
        _write(data, output)
    return parity


def _require_plots() -> None:
    if find_spec("matplotlib") is None:
        raise UsageError(
            "a report needs matplotlib, which is not installed",
            hint="Run `pip install 'kimi-convert[report]'`.",
        )


def _measure(
    checkpoint: Path,
    text: Path | None,
    teacher: Path | None,
    *,
    options: ValidationOptions,
    on_progress: ProgressCallback,
) -> tuple[TextSample | None, QualityReport | None]:
    if text is None:
        return None, None
    config = read_config(checkpoint)
    sample = read_sample(
        text,
        checkpoint=checkpoint,
        teacher=teacher,
        vocab_size=config.vocab_size,
        options=options,
    )
    try:
        found = measure_quality(
            checkpoint, sample.packed, teacher=teacher, options=options, on_progress=on_progress
        )
        if teacher is not None and too_large((config, read_config(teacher)), options) is None:
            greedy = measure_greedy(
                checkpoint,
                sample.packed.tokens[:, :-1],
                teacher=teacher,
                options=options,
                on_progress=on_progress,
            )
            found = replace(found, greedy=greedy)
    except VerificationError:
        # Values that are not finite: the comparison has failed on them, and says where.
        return sample.facts, None
    return sample.facts, found


def _write(data: ReportData, output: Output) -> None:
    # matplotlib takes a second to load, and is not there where no report is written.
    from kimi_convert.validation.page.png import png_of

    output.write_json(REPORT_JSON, data.to_json())
    output.write_bytes(REPORT_HTML, page_of(data).encode("utf-8"))
    for chart in charts_of(data):
        output.write_bytes(f"{chart.key}.png", png_of(chart))
