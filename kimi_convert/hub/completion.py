"""What a publication adds to a checkpoint folder: card, SHA256SUMS, and a signature if asked for.

Nobody's own words are replaced: a card without the generator's mark stays as it is.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from kimi_convert.checkpoints.disk import disk_errors
from kimi_convert.checkpoints.manifest import (
    ABOUT_FILES,
    CARD_FILE,
    RECORD_FILE,
    SIGNATURE_FILE,
    SUMS_FILE,
    HashedFile,
    hash_files,
    sums_text,
)
from kimi_convert.checkpoints.signing import is_of, sign_folder
from kimi_convert.errors import VerificationError
from kimi_convert.hub.card import MARK, CardFacts, card_text, read_conversion
from kimi_convert.validation.record import Record


def completed(
    folder: Path,
    repository: str,
    content: dict[str, HashedFile],
    record: Record | None,
    *,
    key: Path | None,
    write: bool,
) -> tuple[dict[str, HashedFile], dict[str, str]]:
    """Add the files about the content: card, sums, record, signature.

    Args:
        folder: of the checkpoint.
        repository: that it goes to.
        content: its files of content.
        record: of the validation that covers them, if there is one.
        key: the private key to sign with, if it is to be signed.
        write: whether the folder gets them; else it is only told what it would get.

    Returns:
        All files to publish, and the texts of those that are made here.

    Raises:
        UsageError: the key cannot be used.
        VerificationError: there is a signature of other files.
        ResourceError: the folder cannot be written.
    """
    signed = key is not None or (folder / SIGNATURE_FILE).exists()
    texts = _texts(folder, repository, content, record, is_signed=signed)
    if write:
        for name, text in texts.items():
            _write(folder / name, text)
        if key is not None:
            sign_folder(folder, key, leave_out=_strangers(folder, content))
    _check_signature(folder, content, key)
    return {**content, **_about(folder, texts, record)}, texts


def _texts(
    folder: Path,
    repository: str,
    content: dict[str, HashedFile],
    record: Record | None,
    *,
    is_signed: bool,
) -> dict[str, str]:
    """Return the files that a publication adds to the folder: hashes, and a card."""
    texts = {SUMS_FILE: sums_text(content)}
    if _may_write_card(folder / CARD_FILE):
        facts = CardFacts(
            repository,
            read_conversion(folder),
            None if record is None else record.report,
            is_signed=is_signed,
        )
        texts[CARD_FILE] = card_text(facts)
    return texts


def _about(folder: Path, texts: dict[str, str], record: Record | None) -> dict[str, HashedFile]:
    """Return the files about the content: card, hashes, the record if it holds, a signature."""
    made = {name: _of_text(name, text) for name, text in texts.items()}
    wanted = [CARD_FILE, SIGNATURE_FILE, *([RECORD_FILE] if record is not None else [])]
    there = [name for name in wanted if name not in made and (folder / name).exists()]
    return {**made, **hash_files(folder, there)}


def _strangers(folder: Path, content: dict[str, HashedFile]) -> list[str]:
    """Return what lies in the folder and is not published."""
    return [
        p.name for p in folder.iterdir() if p.name not in content and p.name not in ABOUT_FILES
    ]


def _check_signature(folder: Path, content: dict[str, HashedFile], key: Path | None) -> None:
    """Refuse a signature of other files than these, which would help nobody.

    Raises:
        VerificationError: the folder has one.
    """
    path = folder / SIGNATURE_FILE
    if key is None and path.exists() and not is_of(path, content.values()):
        raise VerificationError(
            "signature is of other files",
            where=path,
            hint="Sign anew with --sign-key, or remove it.",
        )


def _may_write_card(path: Path) -> bool:
    """Tell whether the card is absent or was generated: nobody's own words are replaced."""
    return not path.exists() or MARK in path.read_text("utf-8", errors="replace")


def _write(path: Path, text: str) -> None:
    data = text.encode()
    with disk_errors(path, doing="complete the folder", nbytes=len(data)):
        if not path.exists() or path.read_bytes() != data:
            fresh = path.with_name(f".{path.name}.fresh")
            fresh.write_bytes(data)
            fresh.replace(path)


def _of_text(name: str, text: str) -> HashedFile:
    data = text.encode()
    return HashedFile(name, len(data), hashlib.sha256(data).hexdigest())
