"""Runs the jobs of a conversion on a Ray cluster whose nodes share storage.

Source and output lie at the same paths on every node, so that any node can take any job. The job of
a lost worker is run again, on another. Every file is read back, and its hash compared, by a second
task before this process notes it in the journal; the index is written here, at the end.

Ray is an extra: nothing of it is imported before a conversion asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from kimi_convert.checkpoints.written import difference
from kimi_convert.conversion.runners import InFlight, OnBytes, OnDone
from kimi_convert.conversion.shard_job import ShardJob, ShardResult, write_shard
from kimi_convert.errors import ResourceError, UsageError, VerificationError

_RETRIES = 3  # of a job whose worker or node is lost
_POLL_SECONDS = 0.5


class _Task(Protocol):
    """A function that runs somewhere in the cluster; returns a reference to what it will return."""

    def options(self, **options: object) -> _Task: ...
    def remote(self, *args: object) -> object: ...


class _Ray(Protocol):
    """What is used of Ray."""

    def init(self, **options: object) -> object: ...
    def is_initialized(self) -> bool: ...
    def shutdown(self) -> None: ...
    def remote(self, function: object, /) -> _Task: ...
    def get(self, reference: object) -> object: ...
    def cancel(self, reference: object, *, force: bool) -> None: ...
    def wait(
        self, references: list[object], *, num_returns: int, timeout: float
    ) -> tuple[list[object], list[object]]: ...


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Runs jobs as tasks of a cluster that is running already."""

    address: str = "auto"  # "auto": RAY_ADDRESS, or the cluster that this machine belongs to

    @property
    def workers(self) -> int:
        """None of them here: each task asks the cluster for its memory."""
        return 0

    @property
    def in_place(self) -> bool:
        """Always: every node sees them there."""
        return True

    def check(self) -> None:
        """See whether there is a cluster.

        Raises:
            UsageError: Ray is not installed, or there is no cluster.
        """
        _connected(self.address).shutdown()

    def run(self, jobs: Sequence[ShardJob], *, on_done: OnDone, on_bytes: OnBytes) -> None:
        """Run every job, and check every file.

        Raises:
            UsageError: Ray is not installed, or there is no cluster.
            VerificationError: a file on the shared storage is not what its worker wrote.
            ResourceError: the cluster has lost a job too often.
        """
        ray = _connected(self.address)
        tasks = _Tasks(ray, InFlight(on_bytes))
        try:
            for job in jobs:
                tasks.start(job)
            while tasks.pending:
                for job, result in tasks.finished():
                    on_done(job, result)
                tasks.progress.report()
        finally:
            tasks.cancel()
            ray.shutdown()


class _Tasks:
    """The tasks of one conversion: first each file is written, then it is read back."""

    def __init__(self, ray: _Ray, progress: InFlight) -> None:
        self._ray = ray
        self._write = ray.remote(write_shard)
        self._read = ray.remote(difference)
        self.progress = progress
        self.pending: dict[object, tuple[ShardJob, ShardResult | None]] = {}

    def start(self, job: ShardJob) -> None:
        options = {"max_retries": _RETRIES, "num_cpus": 1, "memory": job.memory_bytes}
        self.pending[self._write.options(**options).remote(job)] = (job, None)
        self.progress.start(job)

    def finished(self) -> list[tuple[ShardJob, ShardResult]]:
        """Wait for a moment; return the jobs whose files are written and checked."""
        ready, _ = self._ray.wait(list(self.pending), num_returns=1, timeout=_POLL_SECONDS)
        done: list[tuple[ShardJob, ShardResult]] = []
        for reference in ready:
            job, result = self.pending.pop(reference)
            answer = self._answer(reference, job)
            if result is None:
                assert isinstance(answer, ShardResult)
                task = self._read.options(max_retries=_RETRIES, num_cpus=1)
                again = task.remote(job.path, answer.written)
                self.pending[again] = (job, answer)
                continue
            _check(job.path, str(answer))
            self.progress.finish(job)
            done.append((job, result))
        return done

    def cancel(self) -> None:
        """Stop what is running: where everything has ended, nothing is."""
        for reference in self.pending:
            self._ray.cancel(reference, force=True)

    def _answer(self, reference: object, job: ShardJob) -> object:
        """Return what a task returned, or raise what it raised, as if it had run here."""
        try:
            return self._ray.get(reference)
        except Exception as error:
            cause = getattr(error, "cause", None)  # of an exception in the task itself
            if isinstance(cause, BaseException):
                raise cause from error
            raise ResourceError(
                "the Ray cluster lost a job",
                where=job.shard.file_name,
                expected=f"its worker to end within {_RETRIES + 1} attempts",
                found=type(error).__name__,
                hint="See `ray status` for nodes without memory; then add --resume.",
            ) from error


def _check(path: Path, found: str) -> None:
    if found:
        raise VerificationError(
            "a file that another node wrote reads differently here",
            where=path,
            found=found,
            hint="The storage that the nodes share gives them different bytes.",
        )


def _connected(address: str) -> _Ray:
    try:
        ray = cast("_Ray", import_module("ray"))
    except ImportError as error:
        raise UsageError(
            "Ray is not installed",
            hint="pip install 'kimi-convert[ray]', on every node of the cluster.",
        ) from error
    if ray.is_initialized():
        raise UsageError(
            "this process is connected to a Ray cluster already",
            hint="Call `ray.shutdown()` before the conversion.",
        )
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        raise UsageError(
            "there is no Ray cluster to run on",
            expected="a running cluster that this machine belongs to, or RAY_ADDRESS",
            found=str(error).splitlines()[0],
            hint="`ray start --head` starts one; on one machine, --jobs needs none.",
        ) from error
    return ray
