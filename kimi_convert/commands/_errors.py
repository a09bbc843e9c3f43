"""Every exception that reaches the command line as one error with a message and an exit code."""

from __future__ import annotations

import errno
import sys
from importlib import metadata

import typer

from kimi_convert.errors import KimiConvertError, ResourceError, UsageError

_FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# How torch words it when the system refuses memory for a tensor on the CPU.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


class UnexpectedError(KimiConvertError):
    """An exception that nothing expected: a bug."""

    exit_code = 1


class InterruptError(KimiConvertError):
    """Ctrl-C."""

    exit_code = 130


class LostOutputError(ResourceError):
    """The result cannot be printed: a full disk behind standard output."""


def as_error(error: Exception, *, program: str) -> KimiConvertError:
    """Return the error to show for any exception."""
    if isinstance(error, KimiConvertError):
        return error
    if isinstance(error, typer.TyperException):
        return UsageError(
            error.format_message(), hint=f"Run `{_command_path(error, program)} --help`."
        )
    return _resource_error(error) or UnexpectedError(
        f"this is a bug in kimi-convert: {type(error).__name__}: {error}",
        hint=f"Run again with --verbose for the traceback, and report it {_report_place()}.",
    )


def _resource_error(error: Exception) -> ResourceError | None:
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return ResourceError(
            "no space left to write",
            where=error.filename or "",
            found=error.strerror or "",
            hint="Free space there, or choose another output folder.",
        )
    if _is_out_of_memory(error):
        return ResourceError(
            "not enough memory",
            found=str(error).partition("\n")[0] or type(error).__name__,
            hint="Close other programs, use a machine with more memory, or a narrower --dtype "
            "where the command has one.",
        )
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    ):
        return True
    torch = sys.modules.get("torch")  # not imported to ask: without it, it did not raise
    return isinstance(error, RuntimeError) and (
        (torch is not None and isinstance(error, torch.OutOfMemoryError))
        or _CPU_ALLOCATOR in str(error)
    )


def _command_path(error: typer.TyperException, program: str) -> str:
    return str(getattr(getattr(error, "ctx", None), "command_path", program))


def _report_place() -> str:
    """Return where bugs go: what the package's metadata says, so that it is said once."""
    try:
        urls = metadata.metadata("kimi-convert").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        urls = []
    issues = dict(url.split(", ", 1) for url in urls).get("Issues")
    return f"at {issues}" if issues else "to the project"
