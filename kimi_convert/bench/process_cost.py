"""Run a program and measure it: time on the clock and on the processor, and its largest memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kimi_convert.errors import VerificationError

_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True, slots=True)
class Cost:
    """What one program took."""

    seconds: float
    processor_seconds: float
    peak_bytes: int  # resident set of the program itself, mapped files included
    stdout: bytes


def run_measured(command: Sequence[object]) -> Cost:
    """Run a program to its end.

    Raises:
        VerificationError: it failed; what it said is on stderr.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as stdout:
        process = subprocess.Popen([str(part) for part in command], stdout=stdout)  # noqa: S603
        status, usage = _wait(process)
        seconds = time.monotonic() - started
        if status:
            raise VerificationError(
                "a program that was to be measured failed",
                where=" ".join(str(part) for part in command[:4]),
                expected="exit code 0",
                found=status,
            )
        stdout.seek(0)
        return Cost(
            seconds=seconds,
            processor_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=usage.ru_maxrss * _RSS_UNIT_BYTES,
            stdout=stdout.read(),
        )


def wait_for_peak(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; return the peak of its resident set in bytes."""
    _, usage = _wait(process)
    return usage.ru_maxrss * _RSS_UNIT_BYTES


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, resource.struct_rusage]:
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage
