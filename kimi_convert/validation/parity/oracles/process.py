"""How an oracle's process is asked and answers: a JSON file in, a file of tensors out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch

import kimi_convert
from kimi_convert.validation.parity.greedy import continue_by
from kimi_convert.validation.parity.trace import Greedy, Trace, load_trace, save_trace

_PACKAGE_PARENT = str(Path(kimi_convert.__file__).parents[1])
_LAST_LINES = 1
_DECLINED = 75


PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleRequest:
    """What an oracle shall compute, in fp32; on the CPU where it runs there."""

    folder: str  # the checkpoint
    artifact: str = ""  # what was written from it, where that is what runs
    tokens: list[list[int]]  # [B, T]
    forms: list[str]  # of PREFILL, all tokens at once, and DECODE, one at a time with a cache
    prompt: list[int]
    new_tokens: int  # of the greedy continuation, which goes with the first form; 0 for none

    @property
    def token_ids(self) -> torch.Tensor:
        """Tokens [B, T] int64."""
        return torch.tensor(self.tokens)

    def continued(self, step: Callable[[list[int]], torch.Tensor]) -> Greedy | None:
        """Continue the prompt, if that is asked for; see `continue_by`."""
        return continue_by(step, self.prompt, self.new_tokens) if self.new_tokens else None


class OracleFailedError(Exception):
    """The library does not run what it should; the message is its last words."""


class OracleDeclinedError(Exception):
    """What is asked is not this oracle's business; the message says why."""


def ask_oracle(module: str, request: OracleRequest) -> dict[str, Trace]:
    """Run a module of this package in a process and return its trace in each form it has.

    Raises:
        OracleFailedError: it ended with an error.
        OracleDeclinedError: it does not run such a thing, and need not.
    """
    with tempfile.TemporaryDirectory(prefix="kimi-convert-parity-") as name:
        folder = Path(name)
        asked = folder / "request.json"
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        paths = (_PACKAGE_PARENT, os.environ.get("PYTHONPATH", ""))
        done = subprocess.run(  # noqa: S603  (this interpreter, this package)
            # -P: a file in the current folder must not stand in for a library.
            [sys.executable, "-P", "-m", module, str(asked)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        answers = {form: folder / _file_name(form) for form in request.forms}
        found = {form: path for form, path in answers.items() if path.exists()}
        if done.returncode != 0 or not found:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            said = " ".join(lines[-_LAST_LINES:]) or f"exit code {done.returncode}"
            declined = done.returncode == _DECLINED
            raise OracleDeclinedError(said) if declined else OracleFailedError(said)
        return {form: load_trace(path) for form, path in found.items()}


def answer_request(
    compute: Callable[[OracleRequest], Mapping[str, Trace]], arguments: list[str]
) -> None:
    """Answer the request that an oracle's process was started with."""
    (asked,) = map(Path, arguments)
    request = OracleRequest(**json.loads(asked.read_text(encoding="utf-8")))
    for form, trace in compute(request).items():
        save_trace(trace, asked.with_name(_file_name(form)))


def decline(why: str) -> NoReturn:
    """End an oracle's process: what is asked is not its business."""
    sys.stderr.write(f"{why}\n")
    raise SystemExit(_DECLINED)


def _file_name(form: str) -> str:
    return f"{form}.safetensors"
