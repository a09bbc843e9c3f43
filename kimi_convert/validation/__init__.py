"""Is a checkpoint whole, does it compute the same in every form, and what is it worth."""

from __future__ import annotations

from kimi_convert.validation.options import Check, ValidationOptions
from kimi_convert.validation.parity.report import ParityReport
from kimi_convert.validation.parity.run import ParityOptions, compare_implementations
from kimi_convert.validation.report import Finding, NotRun, Severity, ValidationReport
from kimi_convert.validation.run import validate_checkpoint

__all__ = [
    "Check",
    "Finding",
    "NotRun",
    "ParityOptions",
    "ParityReport",
    "Severity",
    "ValidationOptions",
    "ValidationReport",
    "compare_implementations",
    "validate_checkpoint",
]
