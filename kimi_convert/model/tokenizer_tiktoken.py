"""tiktoken.model, the vocabulary of Moonlight, Kimi-K2 and Kimi-Linear, through `tiktoken`.

The file holds the ranks of byte pairs alone. How text is cut before pairs are merged, and which
ids follow the ranks, are facts of the published tokenization_moonshot.py and tokenization_kimi.py
(https://huggingface.co/moonshotai/Kimi-Linear-48B-A3B-Instruct). None of that code is run.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import tiktoken

from kimi_convert.checkpoints.file_kinds import recognise
from kimi_convert.checkpoints.messages import quoted
from kimi_convert.checkpoints.strict_json import as_object
from kimi_convert.errors import TokenizerError
from kimi_convert.model.tokenizer_codec import Codec, well_formed
from kimi_convert.model.tokenizer_files import (
    TOKENIZER_CONFIG,
    declared_vocab_size,
    read_bytes,
    read_json,
)

TIKTOKEN_MODEL = "tiktoken.model"

# Runs of Han are pieces of their own; otherwise as OpenAI's o200k_base.
_MARK_OR_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_MARK_OR_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_WORD = r"[^\r\n\p{L}\p{N}]?%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PIECES = "|".join(
    (
        r"[\p{Han}]+",
        _WORD % f"{_MARK_OR_UPPER}*{_MARK_OR_LOWER}+",
        _WORD % f"{_MARK_OR_UPPER}+{_MARK_OR_LOWER}*",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# The published tokenizer hands over at most this many characters at a time, and cuts longer runs
# with or without white space; ids of very long runs depend on it.
_MAX_CHARACTERS = 400_000
_MAX_RUN_CHARACTERS = 25_000
_RUN = re.compile(r"\s+|\S+")

_RESERVED_IDS = 256
_MAX_TOKEN_BYTES = 4096  # a bound, not a fact of the format
_MAX_RANK_DIGITS = 9


def load_tiktoken_model(folder: Path) -> Codec:
    """Read tiktoken.model, and the names of special tokens from tokenizer_config.json.

    Up to 256 special ids follow the ranks, as far as the model's vocabulary reaches.

    Raises:
        TokenizerError: a file is not valid, or the two contradict each other.
    """
    path = folder / TIKTOKEN_MODEL
    ranks = _parse_ranks(read_bytes(path), path=path)
    special_ids = _special_ids(folder, num_ranks=len(ranks))
    encoding = tiktoken.Encoding(
        "kimi", pat_str=_PIECES, mergeable_ranks=ranks, special_tokens=special_ids
    )

    def encode(text: str) -> list[int]:
        return [i for part in _parts(text) for i in encoding.encode_ordinary(part)]

    token_bytes = {rank: token for token, rank in ranks.items()}
    token_bytes |= {token_id: name.encode() for name, token_id in special_ids.items()}
    return Codec(encode, token_bytes, special_ids)


def _parse_ranks(data: bytes, *, path: Path) -> dict[bytes, int]:
    """Parse lines of "base64 rank": ranks from 0 without a gap, all single bytes among them."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        token, rank = _parse_rank(line, where=f"{path}:{number}", start=data)
        if token in ranks:
            raise TokenizerError("a token has two ranks", where=f"{path}:{number}", found=token)
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(
            "the ranks are not complete",
            where=path,
            expected=f"each of 0 to {len(ranks) - 1} once",
            hint="The file is damaged; download it again.",
        )
    missing = [byte for byte in range(0x100) if bytes((byte,)) not in ranks]
    if missing:
        raise TokenizerError(
            "single bytes have no rank, so not every text can be encoded",
            where=path,
            expected="all 256 bytes",
            found=f"{len(missing)} missing, the first {missing[0]:#04x}",
        )
    return ranks


def _parse_rank(line: bytes, *, where: str, start: bytes) -> tuple[bytes, int]:
    encoded, _, digits = line.partition(b" ")
    try:
        token = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        token = b""
    is_rank = digits.isdigit() and len(digits) <= _MAX_RANK_DIGITS
    if not (is_rank and 0 < len(token) <= _MAX_TOKEN_BYTES):
        kind = recognise(start)
        raise TokenizerError(
            "a line of tiktoken.model is not understood",
            where=where,
            expected="a token in base64, a space, its rank",
            found=kind.title if kind else ascii(line[:60]),
            hint=kind.hint if kind else "The file is damaged; download it again.",
        )
    return token, int(digits)


def _special_ids(folder: Path, *, num_ranks: int) -> dict[str, int]:
    """Return the ids after the ranks by name; those without one are `<|reserved_token_N|>`."""
    end = num_ranks + _RESERVED_IDS
    end = max(num_ranks, min(end, declared_vocab_size(folder) or end))
    names = dict(_added_tokens(folder))
    for token_id, name in names.items():
        if not num_ranks <= token_id < end:
            raise TokenizerError(
                f"the id of the special token {quoted(name)} is out of range",
                where=folder / TOKENIZER_CONFIG,
                expected=f"{num_ranks} to {end - 1}",
                found=token_id,
                hint="Tokenizer files and config.json must come from the same checkpoint.",
            )
    by_name = {
        names.get(token_id, f"<|reserved_token_{token_id}|>"): token_id
        for token_id in range(num_ranks, end)
    }
    if len(by_name) != end - num_ranks:
        raise TokenizerError("two special tokens have one name", where=folder / TOKENIZER_CONFIG)
    return by_name


def _added_tokens(folder: Path) -> Iterator[tuple[int, str]]:
    """Yield ids and names from `added_tokens_decoder` in tokenizer_config.json."""
    added = read_json(folder, TOKENIZER_CONFIG).get("added_tokens_decoder", {})
    for key, value in _object(added, folder).items():
        name = _object(value, folder).get("content")
        is_id = key.isascii() and key.isdigit() and len(key) <= _MAX_RANK_DIGITS
        if not (is_id and isinstance(name, str) and name and name == well_formed(name)):
            raise _wrong_added_token(folder, {key: value})
        yield int(key), name


def _object(value: object, folder: Path) -> Mapping[str, object]:
    found = as_object(value)
    if found is None:
        raise _wrong_added_token(folder, value)
    return found


def _wrong_added_token(folder: Path, found: object) -> TokenizerError:
    return TokenizerError(
        "field 'added_tokens_decoder' is not valid",
        where=folder / TOKENIZER_CONFIG,
        expected="an object from ids to objects with a 'content'",
        found=quoted(found),
    )


def _parts(text: str) -> Iterator[str]:
    """Cut a text as the published tokenizer does before it looks for pieces."""
    for start in range(0, len(text), _MAX_CHARACTERS):
        yield from _cut_runs(text[start : start + _MAX_CHARACTERS])


def _cut_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _RUN.finditer(text):
        for cut in range(run.start() + _MAX_RUN_CHARACTERS, run.end(), _MAX_RUN_CHARACTERS):
            yield text[start:cut]
            start = cut
    yield text[start:]
