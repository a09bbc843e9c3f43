"""Whether a checkpoint is what its config.json and its recorded hashes say, byte by byte.

Nothing is run. Each tensor is read once, for its values and its hash; files, or their headers where
that is what was recorded, are hashed apart. What is wrong is collected, so that one call tells all
of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from kimi_convert.checkpoints.finite import FLOATS, find_non_finite
from kimi_convert.checkpoints.hashing import sha256_of_file
from kimi_convert.checkpoints.index import CheckpointIndex, open_index
from kimi_convert.checkpoints.messages import listed
from kimi_convert.checkpoints.reader import CheckpointReader
from kimi_convert.checkpoints.safetensors_header import TensorSpec, read_header
from kimi_convert.checkpoints.weight_map import SHARD_SUFFIX
from kimi_convert.checkpoints.written import sha256_of_header
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.progress import ProgressCallback, ProgressEvent
from kimi_convert.errors import CheckpointError
from kimi_convert.model.names.layout import MatchedCheckpoint, match_checkpoint
from kimi_convert.validation.options import Check
from kimi_convert.validation.recorded_hashes import (
    FileHash,
    RecordedHashes,
    read_recorded_hashes,
)
from kimi_convert.validation.report import Finding, IntegrityReport, Severity

# The check of names, shapes and dtypes, as findings call it.
TENSORS = "tensors"


def check_integrity(
    folder: Path,
    config: ModelConfig,
    *,
    checks: frozenset[Check],
    on_progress: ProgressCallback,
) -> tuple[IntegrityReport, tuple[Finding, ...]]:
    """Check names, shapes and dtypes, and where asked for values and hashes.

    Raises:
        CheckpointError: the folder is not one whole checkpoint in safetensors format.
    """
    index = open_index(folder)
    matched, findings = _match(config, index)
    findings += _unread_files(index)
    recorded: list[RecordedHashes] = []
    if Check.HASHES in checks:
        try:
            recorded += read_recorded_hashes(folder)
        except CheckpointError as error:
            findings.append(_as_finding(error, Check.HASHES))
    files_hashed = 0
    for one in recorded:
        findings += _check_files(index, one, on_progress)
        files_hashed += len(one.files)
        findings += _uncovered(index, one)
    tensor_hashes = {name: digest for one in recorded for name, digest in one.tensors.items()}
    scanned = _scanned(index) if Check.VALUES in checks else ()
    findings += _check_tensors(index, scanned, tensor_hashes, on_progress)
    report = IntegrityReport(
        tensors=len(index.tensors),
        nbytes=index.nbytes,
        values_scanned=len(scanned),
        hashes_from=tuple(one.source for one in recorded),
        files_hashed=files_hashed,
        tensors_hashed=len(tensor_hashes.keys() & index.tensors.keys()),
        left_out={one.name: one.why for one in matched.dropped} if matched else {},
    )
    return report, tuple(findings)


def _match(
    config: ModelConfig, index: CheckpointIndex
) -> tuple[MatchedCheckpoint | None, list[Finding]]:
    try:
        return match_checkpoint(config, index.tensors.values(), where=index.folder), []
    except CheckpointError as error:
        return None, [_as_finding(error, TENSORS)]


def _unread_files(index: CheckpointIndex) -> Iterator[Finding]:
    for path in sorted(index.folder.glob(f"*{SHARD_SUFFIX}")):
        if path.name not in index.shards:
            message = "file of weights is not named by the index, so nothing reads it"
            yield Finding(Severity.WARNING, TENSORS, path.name, message)


def _check_files(
    index: CheckpointIndex, recorded: RecordedHashes, on_progress: ProgressCallback
) -> Iterator[Finding]:
    done = 0
    for name, expected in recorded.files.items():
        on_progress(ProgressEvent("hashing files", done, len(recorded.files), "files", name))
        yield from _check_file(index.folder / name, expected)
        done += 1
    on_progress(ProgressEvent("hashing files", done, len(recorded.files), "files"))
    for shard in index.shards:
        if shard not in recorded.files:
            message = f"file of weights has no hash in {recorded.source}"
            yield Finding(Severity.WARNING, Check.HASHES, shard, message)


def _check_file(path: Path, expected: FileHash) -> Iterator[Finding]:
    if not path.is_file():
        yield _hash_error(path.name, "recorded file is missing", "a file", "none")
        return
    nbytes = path.stat().st_size
    if expected.nbytes not in (None, nbytes):
        yield _hash_error(
            path.name,
            "file does not have its recorded size",
            f"{expected.nbytes} bytes",
            f"{nbytes} bytes",
        )
        return
    what = "header of the file" if expected.of_header else "file"
    try:
        header = read_header(path) if expected.of_header else None
        digest = sha256_of_file(path) if header is None else sha256_of_header(path, header)
    except CheckpointError as error:
        yield _as_finding(error, Check.HASHES)
        return
    if digest != expected.sha256:
        message = f"{what} does not have its recorded SHA-256"
        yield _hash_error(path.name, message, expected.sha256, digest)


def _uncovered(index: CheckpointIndex, recorded: RecordedHashes) -> Iterator[Finding]:
    if not recorded.tensors:
        return
    missing = [name for name in recorded.tensors if name not in index.tensors]
    if missing:
        message = f"{len(missing)} tensors with a recorded hash are missing"
        yield _hash_error(recorded.source, message, "tensors", listed(missing))
    extra = [name for name in index.tensors if name not in recorded.tensors]
    if extra:
        message = f"{len(extra)} tensors have no recorded hash"
        yield Finding(
            Severity.WARNING, Check.HASHES, recorded.source, message, found=listed(extra)
        )


def _scanned(index: CheckpointIndex) -> Sequence[TensorSpec]:
    return [tensor for tensor in index.tensors.values() if tensor.dtype in FLOATS]


def _check_tensors(
    index: CheckpointIndex,
    scanned: Iterable[TensorSpec],
    hashes: Mapping[str, str],
    on_progress: ProgressCallback,
) -> Iterator[Finding]:
    """Read each tensor that is scanned or hashed once, in the order of the files."""
    to_scan = {tensor.name for tensor in scanned}
    wanted = [t for t in index.tensors.values() if t.name in to_scan or t.name in hashes]
    total, done = sum(tensor.nbytes for tensor in wanted), 0
    with CheckpointReader(index) as reader:
        for tensor in wanted:
            on_progress(ProgressEvent("reading tensors", done, total, "bytes", tensor.name))
            yield from _check_tensor(
                tensor,
                reader.chunks(tensor.name),
                scan=tensor.name in to_scan,
                sha256=hashes.get(tensor.name),
            )
            done += tensor.nbytes
    on_progress(ProgressEvent("reading tensors", done, total, "bytes"))


def _check_tensor(
    tensor: TensorSpec, chunks: Iterator[memoryview], *, scan: bool, sha256: str | None
) -> Iterator[Finding]:
    digest = hashlib.sha256()
    num_nan, num_inf, first, seen = 0, 0, None, 0
    count = math.prod(tensor.shape)
    for chunk in chunks:
        if sha256 is not None:
            digest.update(chunk)
        found = find_non_finite(chunk, tensor.dtype) if scan else None
        if found is not None:
            num_nan, num_inf = num_nan + found[0], num_inf + found[1]
            first = seen + found[2] if first is None else first
        seen += chunk.nbytes * count // tensor.nbytes
    if first is not None:
        yield Finding(
            Severity.ERROR,
            Check.VALUES,
            tensor.name,
            "tensor holds values that are not finite",
            "finite values",
            f"{num_nan} NaN and {num_inf} Inf of {count}, the first at {_place(tensor, first)}",
        )
    if sha256 not in (None, digest.hexdigest()):
        message = "tensor does not have its recorded SHA-256"
        yield _hash_error(tensor.name, message, str(sha256), digest.hexdigest())


def _place(tensor: TensorSpec, flat: int) -> list[int]:
    place: list[int] = []
    for size in reversed(tensor.shape):
        flat, at = divmod(flat, size)
        place.insert(0, at)
    return place


def _hash_error(where: str, message: str, expected: str, found: str) -> Finding:
    return Finding(Severity.ERROR, Check.HASHES, where, message, expected, found)


def _as_finding(error: CheckpointError, check: str) -> Finding:
    return Finding(Severity.ERROR, check, error.where, error.message, error.expected, error.found)
