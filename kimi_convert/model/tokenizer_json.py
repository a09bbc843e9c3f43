"""tokenizer.json with byte-level BPE, through the `tokenizers` library.

In such a vocabulary every byte is written as one printable character. Decoders of other kinds
(word pieces, sentence pieces) are refused: no supported model family has one.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.decoders import ByteLevel

from kimi_convert.checkpoints.file_kinds import recognise
from kimi_convert.errors import TokenizerError
from kimi_convert.model.tokenizer_codec import Codec
from kimi_convert.model.tokenizer_files import read_bytes

TOKENIZER_JSON = "tokenizer.json"


def load_tokenizer_json(folder: Path) -> Codec:
    """Read tokenizer.json; padding, truncation and post-processing in it are not applied.

    Raises:
        TokenizerError: the file is not valid, has no tokens or is not byte level.
    """
    path = folder / TOKENIZER_JSON
    library = _parse(path)
    # Otherwise "<|eos|>" in a text would become the special token.
    library.encode_special_tokens = True
    added = library.get_added_tokens_decoder()
    alphabet = _byte_alphabet()
    token_bytes = {
        token_id: _bytes_of(token, alphabet)
        for token, token_id in library.get_vocab(with_added_tokens=False).items()
    } | {token_id: token.content.encode() for token_id, token in added.items()}
    if not token_bytes:
        raise TokenizerError("the vocabulary is empty", where=path)
    return Codec(
        encode=lambda text: library.encode(text, add_special_tokens=False).ids,
        token_bytes=token_bytes,
        special_ids={token.content: token_id for token_id, token in added.items()},
    )


def _parse(path: Path) -> LibraryTokenizer:
    data = read_bytes(path)
    try:
        library = LibraryTokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception for many faults of a file
        kind = recognise(data)
        raise TokenizerError(
            "tokenizer.json is not understood",
            where=path,
            found=kind.title if kind else str(error)[:200],
            hint=kind.hint if kind else "The file is damaged; download it again.",
        ) from error
    decoder: object = library.decoder
    if not isinstance(decoder, ByteLevel):
        raise TokenizerError(
            "tokenizer.json is not byte level",
            where=path,
            expected="a decoder of type ByteLevel",
            found=type(decoder).__name__,
            hint="Give texts as token ids, which need no tokenizer.",
        )
    library.no_truncation()
    library.no_padding()
    return library


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    GPT-2's convention: bytes that Latin-1 prints stand for themselves, the others are, in order,
    the characters from U+0100 on.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(0x100)) - set(printed))
    characters = [*printed, *range(0x100, 0x100 + len(hidden))]
    return dict(zip(map(chr, characters), printed + hidden, strict=True))


def _bytes_of(token: str, alphabet: dict[str, int]) -> bytes:
    """Undo the alphabet; a token with other characters stands for its own UTF-8."""
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()
