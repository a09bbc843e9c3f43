"""Small tokenizers in folders: the files of Kimi's, with few merges."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

MOONLET = Path(__file__).parents[3] / "examples" / "moonlet-7m"

SINGLE_BYTES = tuple(bytes((byte,)) for byte in range(256))
BOS, EOS, PAD = "[BOS]", "[EOS]", "[PAD]"


def rank_lines(tokens: Sequence[bytes]) -> bytes:
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    return b"".join(lines)


def write_json(folder: Path, name: str, document: object) -> None:
    (folder / name).write_text(json.dumps(document), encoding="utf-8")


def write_tiktoken_folder(
    folder: Path,
    merges: Sequence[bytes] = (),
    *,
    added: dict[int, str] | None = None,
    vocab_size: int | None = None,
) -> Path:
    """Write ranks of all single bytes and `merges`; names of special tokens by place after them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = (*SINGLE_BYTES, *merges)
    (folder / "tiktoken.model").write_bytes(rank_lines(tokens))
    names = {0: BOS, 1: EOS} if added is None else added
    decoder = {str(len(tokens) + place): {"content": name} for place, name in names.items()}
    document = {"added_tokens_decoder": decoder, "bos_token": BOS, "eos_token": {"content": EOS}}
    write_json(folder, "tokenizer_config.json", document)
    if vocab_size is not None:
        write_json(folder, "config.json", {"vocab_size": vocab_size})
    return folder
