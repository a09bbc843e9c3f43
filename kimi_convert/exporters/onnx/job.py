"""What `export onnx` does: an export, then, if a text is given, graph and checkpoint on that text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_convert.config.progress import ProgressCallback, ignore_progress
from kimi_convert.errors import UsageError
from kimi_convert.exporters.onnx.export import OnnxExportResult, export_onnx
from kimi_convert.exporters.onnx.options import OnnxOptions

if TYPE_CHECKING:
    from kimi_convert.exporters.onnx.text_comparison import TextComparison


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxJobResult:
    """What was written, and what it is worth if that was asked."""

    export: OnnxExportResult
    comparison: TextComparison | None

    def to_json(self) -> dict[str, object]:
        """Return the document that `export onnx --json` prints."""
        comparison = None if self.comparison is None else self.comparison.to_json()
        return {**self.export.to_json(), "comparison": comparison}


def export_and_compare(
    checkpoint: Path,
    output: Path,
    *,
    options: OnnxOptions,
    text: Path | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> OnnxJobResult:
    """Export a checkpoint; arguments and errors as `export_onnx`'s and `compare_on_text`'s.

    Raises:
        UsageError: a text is given, but the graph would give the last logits alone.
    """
    if text is not None and options.last_logits:
        raise UsageError(
            "the loss on a text needs logits of every position",
            found="--last-logits",
            hint="Leave out --last-logits or --text.",
        )
    if text is not None and not text.is_file():
        raise UsageError("there is no such text", found=text)
    export = export_onnx(checkpoint, output, options=options, on_progress=on_progress)
    if text is None:
        return OnnxJobResult(export=export, comparison=None)
    from kimi_convert.exporters.onnx.text_comparison import compare_on_text

    comparison = compare_on_text(checkpoint, export.output, text, on_progress=on_progress)
    return OnnxJobResult(export=export, comparison=comparison)
