"""Run the command line: in a process of its own, as a user does, or faster in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import kimi_convert
from kimi_convert.cli import main

PACKAGE_PARENT = Path(kimi_convert.__file__).parents[1]


def environment(**extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"}
    return {**kept, "PYTHONPATH": str(PACKAGE_PARENT), "OMP_NUM_THREADS": "1", **extra}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kimi_convert", *map(str, arguments)]


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run in this process, which has torch loaded already."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def run_cli(
    *arguments: object, cwd: Path | None = None, stdin: str = "", **extra: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**extra),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
