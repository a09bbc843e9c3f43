"""The files around a tokenizer's vocabulary: bounded reading, and which ids config files declare.

Whatever is wrong with one of them is a `TokenizerError`.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kimi_convert.checkpoints.messages import quoted, sized
from kimi_convert.checkpoints.regular_file import open_regular, read_exactly
from kimi_convert.checkpoints.strict_json import as_object, parse_object
from kimi_convert.config.fields import Fields
from kimi_convert.errors import CheckpointError, ConfigError, TokenizerError

TOKENIZER_CONFIG = "tokenizer_config.json"

# Far above real files: tokenizer.json of a vocabulary of 200,000 has about 30 MB.
_MAX_FILE_BYTES = 256 * 1024 * 1024
_MODEL_CONFIG = "config.json"
_ID_FILES = ("generation_config.json", _MODEL_CONFIG)
_NAME_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json")


class TokenRole(StrEnum):
    """What a special token is for, as config files call it."""

    BOS = "bos"
    EOS = "eos"


@dataclass(frozen=True, slots=True)
class DeclaredToken:
    """What config files say about a role; not yet checked against the vocabulary."""

    ids: tuple[int, ...]  # empty where no file gives a number
    name: str | None


def declared_vocab_size(folder: Path) -> int | None:
    """Return the model's vocabulary size, or None where there is no config.json that says it.

    Raises:
        TokenizerError: config.json is not valid JSON, or the field no number above 0.
    """
    with _as_tokenizer_errors():
        vocab_size = _fields(folder, _MODEL_CONFIG).optional_integer("vocab_size")
    if vocab_size is not None and vocab_size < 1:
        raise TokenizerError(
            "config field 'vocab_size' is not valid",
            where=folder / _MODEL_CONFIG,
            expected="a number above 0",
            found=vocab_size,
        )
    return vocab_size


def declared_token(folder: Path, role: TokenRole) -> DeclaredToken:
    """Return the ids of a role, from the first file that has them, and its name.

    Raises:
        TokenizerError: a file is not a JSON object, or a field has the wrong type.
    """
    name = _declared_name(folder, f"{role}_token")
    for file_name in _ID_FILES:
        with _as_tokenizer_errors():
            ids = _fields(folder, file_name).integers(f"{role}_token_id")
        if ids:
            return DeclaredToken(ids, name)
    return DeclaredToken((), name)


def has_file(folder: Path, name: str) -> bool:
    """Tell whether a folder holds a file of that name; a link to one counts."""
    return (folder / name).is_file()


def read_json(folder: Path, name: str) -> dict[str, object]:
    """Return the JSON object in a file, empty where there is no such file.

    Raises:
        TokenizerError: it is not a JSON object, is too large or cannot be read.
    """
    if not has_file(folder, name):
        return {}
    with _as_tokenizer_errors():
        return parse_object(read_bytes(folder / name), where=folder / name)


def read_bytes(path: Path) -> bytes:
    """Return all bytes of a plain file of at most 256 MiB.

    Raises:
        TokenizerError: it is larger, not a plain file or not readable.
    """
    with _as_tokenizer_errors(), open_regular(path) as descriptor:
        nbytes = os.fstat(descriptor).st_size
        if nbytes > _MAX_FILE_BYTES:
            raise TokenizerError(
                "a tokenizer file is too large",
                where=path,
                expected=f"at most {sized(_MAX_FILE_BYTES)}",
                found=sized(nbytes),
            )
        return read_exactly(descriptor, nbytes, offset=0, path=path)


def _fields(folder: Path, name: str) -> Fields:
    return Fields(read_json(folder, name), where=folder / name)


def _declared_name(folder: Path, field: str) -> str | None:
    """Return a token's name, which is given as a string or as an object with its `content`."""
    for file_name in _NAME_FILES:
        value = read_json(folder, file_name).get(field)
        described = as_object(value)
        name = value if described is None else described.get("content")
        if isinstance(name, str):
            return name
        if value is not None:
            raise TokenizerError(
                f"field {field!r} is not valid",
                where=folder / file_name,
                expected="a token's text, or an object with its 'content'",
                found=quoted(value),
            )
    return None


@contextmanager
def _as_tokenizer_errors() -> Generator[None]:
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        raise TokenizerError(
            error.message,
            where=error.where,
            expected=error.expected,
            found=error.found,
            hint=error.hint,
        ) from error
