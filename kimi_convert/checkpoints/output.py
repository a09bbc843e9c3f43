"""A new checkpoint folder that appears whole or not at all.

    with open_output(folder, source=source) as output:
        output.require_space(plan.file_bytes)
        for planned in plan.shards:
            with output.shard(planned) as shard:
                for tensor in planned.tensors:
                    shard.write(tensor.name, chunks_of(tensor))
        output.write_index(plan)
        output.write_json("config.json", config)

Files are finished, and made durable, in a hidden folder (see `staging`). At the end of the block
they are renamed into place: weights, other files, config.json, and the index last, without which
no loader takes the folder. An exception removes everything, and the folder too if it is new; where
a journal is kept (`open_journal`), finished files of weights stay for a run that resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from kimi_convert.checkpoints.clone import NO_EXTENTS, NOTHING_SHAREABLE, Extent, Shareable
from kimi_convert.checkpoints.disk import disk_errors, free_bytes, require_free, write_all
from kimi_convert.checkpoints.journal import JOURNAL_FILE, FinishedFile, Journal
from kimi_convert.checkpoints.messages import listed, quoted
from kimi_convert.checkpoints.placing import in_order_of_moving, move_into_place
from kimi_convert.checkpoints.regular_file import chunks_of, open_regular
from kimi_convert.checkpoints.resuming import files_to_keep
from kimi_convert.checkpoints.shard_plan import PlannedShard, ShardPlan
from kimi_convert.checkpoints.staging import LOCK_FILE, Staging, claim_folder
from kimi_convert.checkpoints.weight_map import INDEX_FILE
from kimi_convert.checkpoints.writer import ShardWriter
from kimi_convert.checkpoints.written import WrittenFile, WrittenShard
from kimi_convert.errors import (
    OutputError,
    ResourceError,
    VerificationError,
)


class Output:
    """The files of a new checkpoint while they are being written."""

    def __init__(self, staging: Staging) -> None:
        """Start with no files in a claimed folder."""
        self._staging = staging
        self._shards: dict[str, WrittenShard] = {}
        self._others: dict[str, WrittenFile] = {}
        self._journal: Journal | None = None

    @property
    def folder(self) -> Path:
        """Where the files will be, as a real path."""
        return self._staging.folder

    @property
    def files(self) -> tuple[WrittenFile | WrittenShard, ...]:
        """Every file finished so far: weights by name, then others in the order of writing."""
        weights = sorted(self._shards.values(), key=lambda file: file.name)
        return (*weights, *self._others.values())

    def open_journal(
        self, digest: str, sources: Mapping[str, str] = MappingProxyType({})
    ) -> Mapping[str, FinishedFile]:
        """Keep finished files of weights, whatever happens; return those of an interrupted run.

        Args:
            digest: of everything that the files depend on.
            sources: the state of each file of the source. What was made of a file in another state
                is not kept.

        Raises:
            OutputError: what the interrupted run wrote depends on something else.
        """
        state = self._staging.resumed
        if state is not None and state.digest != digest:
            raise OutputError(
                "the interrupted run was another conversion",
                where=self.folder,
                expected="the same source, recipe, options and version",
                hint=f"Give the same, or remove {self._staging.path} to start anew.",
            )
        kept = files_to_keep(self._staging, sources)
        self._staging.keep_only(kept)
        self._journal = Journal(self._staging.path, digest, kept.values())
        self._shards |= {name: one.written for name, one in kept.items()}
        return kept

    @property
    def resumed_bytes(self) -> int:
        """Bytes of the files that an interrupted run says it has finished."""
        state = self._staging.resumed
        return 0 if state is None else sum(one.written.nbytes for one in state.finished)

    def finish_shard(
        self,
        written: WrittenShard,
        notes: Mapping[str, str] = MappingProxyType({}),
        sources: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Count a file of weights as finished.

        Args:
            written: the file.
            notes: come back when the run is resumed.
            sources: the files it was made of, each with its state; see `open_journal`.

        Raises:
            OutputError: it was finished before.
            ResourceError: the disk does not take the note.
        """
        self.path_of(written.name)
        if self._journal is not None:
            self._journal.append(FinishedFile(written, notes, sources))
        self._shards[written.name] = written

    @property
    def is_resumable(self) -> bool:
        """Whether an exception leaves something to go on from."""
        if self._journal is None:
            return self._staging.resumed is not None
        return bool(self._shards)

    def give_up(self) -> None:
        """Remove everything that no later run can go on from, and let go of the folder."""
        if not self.is_resumable:
            self._staging.discard()
            return
        if self._journal is not None:
            with suppress(ResourceError):  # what led here is the error to be told
                self._staging.keep_only(self._shards)
        self._staging.suspend()

    def require_space(self, nbytes: int, shareable: Shareable = NOTHING_SHAREABLE) -> None:
        """Check, before the first byte, that the disk has room.

        Args:
            nbytes: to be written.
            shareable: what of it needs no room where blocks can be shared.

        Raises:
            ResourceError: fewer than `nbytes` bytes are free.
        """
        free = free_bytes(self.folder)
        if free is not None and free < nbytes:
            nbytes -= shareable.bytes_in(self._staging.path)
        require_free(self.folder, nbytes)

    @contextmanager
    def shard(
        self, planned: PlannedShard, extents: Mapping[str, Extent] = NO_EXTENTS
    ) -> Generator[ShardWriter]:
        """Write one file of weights; all of its tensors must be written inside the block.

        Args:
            planned: what it will hold.
            extents: where tensors lie that are carried over; see `ShardWriter`.

        Raises:
            VerificationError: the file does not become what the plan says.
            ResourceError: the disk does not take it.
        """
        with ShardWriter(self.path_of(planned.file_name), planned, extents) as writer:
            yield writer
            written = writer.finish()
        self.finish_shard(written)

    def write_index(self, plan: ShardPlan) -> WrittenFile:
        """Write the index of all files of weights; also needed where there is only one.

        Raises:
            VerificationError: the files written are not those of the plan.
            ResourceError: the disk does not take it.
        """
        planned = {shard.file_name for shard in plan.shards}
        if planned != self._shards.keys():
            raise VerificationError(
                "files of weights differ from the plan",
                where=self.folder,
                expected=listed(sorted(planned)),
                found=listed(sorted(self._shards)),
            )
        return self.write_bytes(INDEX_FILE, plan.index_json())

    def write_json(self, name: str, document: Mapping[str, object]) -> WrittenFile:
        """Write a JSON file, keys in the order given; NaN is refused with a ValueError."""
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        return self.write_bytes(name, text.encode("utf-8") + b"\n")

    def write_bytes(self, name: str, data: bytes) -> WrittenFile:
        """Write a small file at once.

        Raises:
            OutputError: not a plain file name, or written before.
            ResourceError: the disk does not take it.
        """
        return self._write(name, iter((memoryview(data),)), nbytes=len(data))

    def write_chunks(self, name: str, chunks: Iterator[memoryview], *, nbytes: int) -> WrittenFile:
        """Write a file that comes in pieces, each valid until the next is asked for.

        Raises:
            OutputError: not a plain file name, or written before.
            VerificationError: there are not exactly `nbytes` bytes.
            ResourceError: the disk does not take it.
        """
        written = self._write(name, chunks, nbytes=nbytes)
        found = self.unfinished_path(name).stat().st_size
        if found != nbytes:
            raise VerificationError(
                "file does not have the planned number of bytes",
                where=name,
                expected=nbytes,
                found=found,
            )
        return written

    def unfinished_path(self, name: str) -> Path:
        """Return where a file lies until the folder appears, for a check of its content."""
        return self._staging.path / name

    def copy_file(self, path: Path, name: str | None = None) -> WrittenFile:
        """Copy a plain file, under its own name unless another is given.

        Raises:
            CheckpointError: the file cannot be read.
            OutputError: not a plain file name, or written before.
            ResourceError: the disk does not take it.
        """
        with open_regular(path) as descriptor:
            nbytes = os.fstat(descriptor).st_size
            chunks = chunks_of(descriptor, 0, nbytes, path=path)
            return self._write(name or path.name, chunks, nbytes=nbytes)

    def commit(self) -> None:
        """Rename every file into place, the index last; on failure take all of them back."""
        if self._shards and INDEX_FILE not in self._others:
            raise VerificationError("weights were written without an index", where=self.folder)
        names = [*sorted(self._shards), *in_order_of_moving(self._others)]
        appeared = [name for name in names if os.path.lexists(self.folder / name)]
        if appeared:
            raise OutputError(
                "files appeared in the output folder", where=self.folder, found=listed(appeared)
            )
        if self._journal is not None:
            self._journal.moving(names)
        move_into_place(self._staging, names)

    def _write(self, name: str, chunks: Iterator[memoryview], *, nbytes: int) -> WrittenFile:
        path = self.path_of(name)
        digest = hashlib.sha256()
        with disk_errors(path, doing="write a file", nbytes=nbytes), path.open("xb", 0) as file:
            for chunk in chunks:
                digest.update(chunk)
                write_all(file.fileno(), chunk)
            os.fsync(file.fileno())
        self._others[name] = WrittenFile(name, nbytes, digest.hexdigest())
        return self._others[name]

    def path_of(self, name: str) -> Path:
        """Return where a new file is to be written until it is finished.

        Raises:
            OutputError: not a plain file name, or written before.
        """
        plain = name.isprintable() and name == Path(name).name and name != ""
        if not plain or name.startswith(".") or name in (LOCK_FILE, JOURNAL_FILE):
            raise OutputError("not a plain file name", where=self.folder, found=quoted(name))
        if name in self._shards or name in self._others:
            raise OutputError("file is written twice", where=self.folder, found=quoted(name))
        return self._staging.path / name


@contextmanager
def open_output(
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Generator[Output]:
    """Claim a new or empty folder; what is written inside the block appears at its end.

    Args:
        folder: created if need be.
        source: a folder that the output must not be, hold or lie in.
        resume: go on from what an interrupted run has finished there, if any.

    Raises:
        OutputError: the folder is a file, not empty, in use, holds an interrupted run that is not
            to be resumed, or is not apart from the source.
        ResourceError: it cannot be written.
        VerificationError: at the end, the files are not those of the plan.
    """
    origin = None if source is None else Path(source)
    staging = claim_folder(Path(folder), source=origin, resume=resume)
    output = Output(staging)
    try:
        yield output
        output.commit()
    except BaseException:
        output.give_up()
        raise
    staging.close()
