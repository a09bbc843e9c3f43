"""Errors of one layer's fit say which layer it was."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from kimi_convert.errors import CalibrationError, VerificationError


@contextmanager
def errors_of_layer(layer_idx: int) -> Generator[None]:
    """Name a layer, counted from 0, in errors that pass and name no place."""
    try:
        yield
    except (CalibrationError, VerificationError) as error:
        error.where = error.where or f"layer {layer_idx}"
        raise
