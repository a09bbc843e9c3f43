"""From the tokenizer files of a checkpoint folder to text, ids and bytes.

Two kinds of files are understood, without code from the checkpoint and without a network:
tokenizer.json with byte-level BPE (DeepSeek), and tiktoken.model (Moonlight, Kimi-K2,
Kimi-Linear). Chat templates are carried over by conversions but never applied here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kimi_convert.checkpoints.messages import quoted
from kimi_convert.errors import TokenizerError
from kimi_convert.model.tokenizer_codec import REPLACEMENT, Codec, well_formed
from kimi_convert.model.tokenizer_files import (
    TokenRole,
    declared_token,
    declared_vocab_size,
    has_file,
)
from kimi_convert.model.tokenizer_json import TOKENIZER_JSON, load_tokenizer_json
from kimi_convert.model.tokenizer_tiktoken import TIKTOKEN_MODEL, load_tiktoken_model

# In the order of preference: where both files are there, other loaders read tokenizer.json too.
_BACK_ENDS: Mapping[str, Callable[[Path], Codec]] = {
    TOKENIZER_JSON: load_tokenizer_json,
    TIKTOKEN_MODEL: load_tiktoken_model,
}

# Data only: tokenization_*.py is code and is never carried over.
_CARRIED_FILES = (
    TOKENIZER_JSON,
    "tokenizer_config.json",
    "special_tokens_map.json",
    TIKTOKEN_MODEL,
    "tokenizer.model",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


class Tokenizer(Protocol):
    """Text to token ids and back, over bytes: ids decode to the same text however they are cut."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id allowed: the model's, where config.json says it."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The id that starts a text, if there is one."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a generated text; the first one also separates documents."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text: nothing is added, names of special tokens are plain text.

        Lone surrogates, which no UTF-8 holds, count as U+FFFD.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by name; bytes that are not UTF-8 as U+FFFD.

        Raises:
            TokenizerError: an id is not below `vocab_size`.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which may be a part of a character.

        An id that belongs to the model and to no token (the padding of its vocabulary) gives
        U+FFFD.

        Raises:
            TokenizerError: the id is not below `vocab_size`.
        """
        ...


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder.

    Ids that end a text come from generation_config.json, else config.json, else the tokenizer's
    own files; so does the id that starts one.

    Raises:
        TokenizerError: there is no tokenizer, its files are not valid, or it has ids that the
            model of config.json does not have.
    """
    folder = Path(folder)
    name = next((name for name in _BACK_ENDS if has_file(folder, name)), None)
    if name is None:
        raise TokenizerError(
            "there is no tokenizer",
            where=folder,
            expected=" or ".join(_BACK_ENDS),
            hint="Copy the tokenizer files of the original checkpoint into this folder.",
        )
    codec = _BACK_ENDS[name](folder)
    vocab_size = declared_vocab_size(folder) or max(codec.token_bytes) + 1
    _check_ids("token ids", codec.token_bytes, vocab_size=vocab_size, where=folder / name)
    bos, eos = (
        _role_ids(folder, role, codec=codec, vocab_size=vocab_size)
        for role in (TokenRole.BOS, TokenRole.EOS)
    )
    return _ByteTokenizer(
        codec=codec,
        vocab_size=vocab_size,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
    )


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files in `folder` that make up its tokenizer.

    They are what a converted checkpoint carries over unchanged: data, never code.
    generation_config.json is not among them.
    """
    return tuple(name for name in _CARRIED_FILES if has_file(folder, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class _ByteTokenizer:
    """A `Tokenizer` over whatever a back end gives."""

    codec: Codec
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        return self.codec.encode(well_formed(text))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        found = self.codec.token_bytes.get(token_id)
        if found is not None:
            return found
        _check_ids("token id", (token_id,), vocab_size=self.vocab_size)
        return REPLACEMENT


def _role_ids(folder: Path, role: TokenRole, *, codec: Codec, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that config files give to a role, by number or by name, without repeats."""
    declared = declared_token(folder, role)
    ids = declared.ids
    if not ids and declared.name is not None:
        if declared.name not in codec.special_ids:
            raise TokenizerError(
                f"the {role} token is not one of the tokenizer's special tokens",
                where=folder,
                found=quoted(declared.name),
                hint="The tokenizer files belong to different tokenizers; copy all from one.",
            )
        ids = (codec.special_ids[declared.name],)
    _check_ids(f"{role} token ids", ids, vocab_size=vocab_size, where=folder)
    return tuple(dict.fromkeys(ids))


def _check_ids(what: str, ids: Iterable[int], *, vocab_size: int, where: object = "") -> None:
    outside = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
    if outside is not None:
        raise TokenizerError(
            f"{what} out of range",
            where=where,
            expected=f"0 to {vocab_size - 1}, the ids of the model",
            found=outside,
            hint="Tokenizer and config.json must come from the same checkpoint.",
        )
