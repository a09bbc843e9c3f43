"""The ONNX checker's full check of a file that was written."""

from __future__ import annotations

from pathlib import Path

import onnx

from kimi_convert.errors import VerificationError


def check_file(path: Path) -> None:
    """Run the ONNX checker's full check on a file beside its weights.

    Raises:
        VerificationError: the checker refuses it.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(
            "the ONNX checker refuses the graph", where=path, found=str(error)
        ) from error
