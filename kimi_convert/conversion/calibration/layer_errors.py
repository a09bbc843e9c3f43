"""Errors of one layer's fit say which layer it was."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from kimi_convert.errors import CalibrationError, VerificationError


@contextmanager
def errors_of_layer(layer_idx: int) -> Generator[None]:
    """Name a layer, counted from 0, in errors that pass and name no place.

    Raises:
        CalibrationError: a matrix is singular, or its decomposition does not converge.
    """
    try:
        yield
    except (CalibrationError, VerificationError) as error:
        error.where = error.where or f"layer {layer_idx}"
        raise
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]  (it is documented)
        raise CalibrationError(
            "a matrix of this layer's moments cannot be solved or decomposed",
            where=f"layer {layer_idx}",
            found=str(error),
            hint="Validate the teacher; a longer or more varied text may help.",
        ) from error
