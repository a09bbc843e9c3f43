"""What runs the jobs of a conversion on one machine: one after the other, or in several processes.

Every runner calls the same function, `write_shard`, and tells of each finished file before the
next, so that a journal can note it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Protocol, cast

from kimi_convert.checkpoints.reader import ShardProvider
from kimi_convert.conversion.memory import use_one_heap
from kimi_convert.conversion.shard_job import (
    PART_SUFFIX,
    ShardJob,
    ShardResult,
    write_shard,
)
from kimi_convert.errors import ResourceError

OnDone = Callable[[ShardJob, ShardResult], None]
OnBytes = Callable[[int, str], None]  # bytes of tensors written so far, and what is worked on

_POLL_SECONDS = 0.5
_STOP_SECONDS = 10.0


class Runner(Protocol):
    """Runs jobs."""

    @property
    def workers(self) -> int:
        """How many jobs run at once on this machine; 0 where they run elsewhere."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether the source's files are read where the plan found them."""
        ...

    def check(self) -> None:
        """Refuse, before a fit of minutes, what could not run a job after it.

        Raises:
            UsageError: what the runner needs is not there.
        """
        ...

    def run(self, jobs: Sequence[ShardJob], *, on_done: OnDone, on_bytes: OnBytes) -> None:
        """Run every job; `on_done` is called in this process, once for each, in any order.

        Raises:
            KimiConvertError: of the first job that failed; the others are stopped.
        """
        ...


@dataclass(frozen=True, slots=True)
class OneByOne:
    """Runs jobs in this process, in their order."""

    provider: ShardProvider | None = None  # of source files that are fetched while they are needed

    @property
    def workers(self) -> int:
        """One."""
        return 1

    @property
    def in_place(self) -> bool:
        """Not where they are fetched."""
        return self.provider is None

    def check(self) -> None:
        """Need nothing."""

    def run(self, jobs: Sequence[ShardJob], *, on_done: OnDone, on_bytes: OnBytes) -> None:
        """Run every job; source files that no later job reads are released after each."""
        last_use = {shard: job.shard for job in jobs for shard in job.index.shards}
        before = 0
        for job in jobs:
            base = before
            result = write_shard(
                job,
                on_tensor=lambda name, done, base=base: on_bytes(base + done, name),
                provider=self.provider,
            )
            on_done(job, result)
            before += job.shard.data_bytes
            for shard in job.index.shards:
                if self.provider is not None and last_use[shard] is job.shard:
                    self.provider.release(shard)


one_by_one = OneByOne()


@dataclass(frozen=True, slots=True)
class Processes:
    """Runs jobs in processes of this machine, each with one thread for its products."""

    workers: int

    @property
    def in_place(self) -> bool:
        """Always."""
        return True

    def check(self) -> None:
        """Need nothing."""

    def run(self, jobs: Sequence[ShardJob], *, on_done: OnDone, on_bytes: OnBytes) -> None:
        """Run every job in whichever process is free."""
        waiting = list(reversed(jobs))
        done = InFlight(on_bytes)
        pool = [_Process() for _ in range(min(self.workers, len(jobs)))]
        try:
            for one in pool:
                done.start(one.give(waiting.pop()))
            while done.jobs:
                for one in _answered(pool):
                    job, result = one.take()
                    done.finish(job)
                    on_done(job, result)
                    if waiting:
                        done.start(one.give(waiting.pop()))
                done.report()
        finally:
            for one in pool:
                one.stop()


@dataclass(slots=True)
class InFlight:
    """Tells how far jobs in other processes are, from the sizes of the files that they write."""

    on_bytes: OnBytes
    jobs: list[ShardJob] = field(default_factory=list[ShardJob])
    _finished_bytes: int = 0

    def start(self, job: ShardJob) -> None:
        """Count a job that has begun."""
        self.jobs.append(job)

    def finish(self, job: ShardJob) -> None:
        """Count a job that has ended."""
        self.jobs.remove(job)
        self._finished_bytes += job.shard.data_bytes

    def report(self) -> None:
        """Tell the bytes written by all jobs."""
        names = ", ".join(job.shard.file_name for job in self.jobs)
        self.on_bytes(self._finished_bytes + sum(map(_written_bytes, self.jobs)), names)


def _written_bytes(job: ShardJob) -> int:
    parts = job.path.parent.glob(f"{job.path.name}.*{PART_SUFFIX}")
    try:
        size = max(
            (path.stat().st_size for path in (*parts, job.path) if path.exists()), default=0
        )
    except OSError:  # it has just got its name
        return job.shard.data_bytes
    return max(0, min(size - job.shard.header_bytes, job.shard.data_bytes))


class _Process:
    """One worker process and the pipe to it.

    A server that has imported torch once forks it: no lock, thread or open file is inherited.
    """

    def __init__(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        ours, theirs = context.Pipe()
        self.pipe = cast("Connection[ShardJob | None, object]", ours)
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _without_main():
            self._process.start()
        theirs.close()
        self._job: ShardJob | None = None

    def give(self, job: ShardJob) -> ShardJob:
        """Send a job."""
        self._job = job
        try:
            self.pipe.send(job)
        except ConnectionError as error:
            raise self._died(job) from error
        return job

    def take(self) -> tuple[ShardJob, ShardResult]:
        """Return what came of the job, or raise what it raised."""
        job = self._job
        assert job is not None
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._died(job) from error
        self._job = None
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, ShardResult)
        return job, answer

    def _died(self, job: ShardJob) -> ResourceError:
        self._process.join(_STOP_SECONDS)
        return ResourceError(
            "a worker process died",
            where=job.shard.file_name,
            found=f"exit code {self._process.exitcode}",
            hint="The system kills a process where memory runs out: use fewer --jobs, then --resume.",
        )

    def stop(self) -> None:
        """End the process, whatever it is doing, and wait until it has."""
        self.pipe.close()
        if self._job is not None:
            self._process.terminate()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def _without_main() -> Generator[None]:
    """Keep a new process from running the program's file again, which may have no guard.

    multiprocessing does that so that functions of the file can be sent; none is sent here.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _answered(pool: Sequence[_Process]) -> list[_Process]:
    ready = wait([one.pipe for one in pool], _POLL_SECONDS)
    return [one for one in pool if one.pipe in ready]


def _serve(pipe: Connection[object, ShardJob | None]) -> None:
    """Run jobs until the other side is gone. An interrupt is the other side's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    use_one_heap()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        assert job is not None
        try:
            answer: object = write_shard(job)
        except Exception as error:
            answer = error
        pipe.send(answer)
