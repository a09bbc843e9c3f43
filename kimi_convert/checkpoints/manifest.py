"""The files that make up a checkpoint folder, and their hashes: SHA256SUMS, as `sha256sum` has it.

Content is what a loader or a conversion reads: weights, configuration, tokenizer, provenance and
terms. The card, the record of a validation and a signature are about the content and not of it:
they may be written anew, the card also on the Hub, and the content stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kimi_convert.checkpoints.hashing import sha256_of_file
from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.messages import listed
from kimi_convert.checkpoints.weight_map import INDEX_FILE
from kimi_convert.config.progress import ProgressCallback, ProgressEvent, ignore_progress
from kimi_convert.errors import CheckpointError

CARD_FILE = "README.md"
SUMS_FILE = "SHA256SUMS"
SIGNATURE_FILE = "model.sig"
RECORD_FILE = "validation.json"
ABOUT_FILES = (CARD_FILE, RECORD_FILE, SUMS_FILE, SIGNATURE_FILE)

# Beside the weights; names that are not here are not part of a checkpoint.
SMALL_CONTENT_FILES = (
    "config.json",
    INDEX_FILE,
    "generation_config.json",
    "conversion.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenizer.model",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)

_STAGE = "hashing files"


@dataclass(frozen=True, slots=True)
class HashedFile:
    """One file as it was when it was hashed."""

    name: str
    nbytes: int
    sha256: str


def content_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files of a checkpoint folder that are content, sorted.

    Raises:
        CheckpointError: the folder is not one whole checkpoint, or one of these is a link that
            leads out of it and its cache, a pipe or a folder.
    """
    shards = open_index(folder).shards
    small = [name for name in SMALL_CONTENT_FILES if (folder / name).exists()]
    odd = [name for name in small if not (folder / name).is_file()]
    if odd:
        raise CheckpointError("not a plain file", where=folder, found=listed(odd))
    return tuple(sorted({*shards, *small}))


def hash_files(
    folder: Path, names: Iterable[str], *, on_progress: ProgressCallback = ignore_progress
) -> dict[str, HashedFile]:
    """Hash files of a folder, each read once.

    Raises:
        CheckpointError: one is missing or not readable.
    """
    sizes = {name: (folder / name).stat().st_size for name in names}
    total, done = sum(sizes.values()), 0
    hashed: dict[str, HashedFile] = {}
    for name, nbytes in sizes.items():
        on_progress(ProgressEvent(_STAGE, done, total, "bytes", name))
        hashed[name] = HashedFile(name, nbytes, sha256_of_file(folder / name))
        done += nbytes
    on_progress(ProgressEvent(_STAGE, done, total, "bytes"))
    return hashed


def sums_text(files: Mapping[str, HashedFile]) -> str:
    """Return the text of SHA256SUMS, sorted by name; `sha256sum -c` reads it."""
    return "".join(f"{file.sha256}  {name}\n" for name, file in sorted(files.items()))
