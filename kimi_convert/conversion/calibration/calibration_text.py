"""The text that a conversion is fitted to: rows of tokens from all over a text.

Tokens of one document are alike. A search of twenty rows that follow each other would see two
documents, and a choice of layers by sixteen of them three: what those do not need is then thrown
away. So more text is read than is asked for, where there is more, and rows are taken far apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.calibration import CalibrationRecipe
from kimi_convert.errors import CalibrationError, InputError, TooLittleTextError
from kimi_convert.model.document import Document
from kimi_convert.model.text import pack_documents, read_documents
from kimi_convert.model.tokenizer import Tokenizer, load_tokenizer

_KIND = "calibration"
# Documents are shuffled in groups of so many bytes of text: enough to mix kinds that follow each
# other in a file, without reading a large file whole.
_SHUFFLED_CHARACTERS = 32 * 1024 * 1024
# A byte-level tokenizer has no unknown tokens: a script that it does not know falls to single
# bytes. English and code have 3 to 4 bytes in a token, Chinese about as many. Nothing is told of texts
# that come as ids, nor by a vocabulary of bytes and little more.
_LEAST_BYTES = 1.25
_BYTE_VOCABULARY = 512
_CHECKED_ROWS = 64
_SPREAD = 8  # times the text asked for: what rows are taken from
_LONG_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """Rows of tokens [N, T + 1], those that a search looks at first.

    The last `validation_rows` fit nothing; nor do others of their documents, where there is more
    text than is asked for. The `long_rows` before them follow each other.
    """

    tokens: torch.Tensor  # int64
    validation_rows: int
    long_rows: int
    training: torch.Tensor  # [L, T]: every row that may be trained on, in the text's order

    @property
    def inputs(self) -> torch.Tensor:
        """[N, T]."""
        return self.tokens[:, :-1]

    @property
    def long(self) -> torch.Tensor:
        """[m, T + 1], rows that follow each other."""
        stop = len(self.tokens) - self.validation_rows
        return self.tokens[stop - self.long_rows : stop]


def calibration_text(
    path: Path, source: Path, config: ModelConfig, recipe: CalibrationRecipe, *, seed: int
) -> CalibrationText:
    """Read, shuffle and pack a text for a model.

    Args:
        path: `.jsonl` or `.txt`; see `read_documents`.
        source: folder of the model, with its tokenizer.
        config: of the model.
        recipe: how many tokens of what length.
        seed: of the order of documents.

    Raises:
        InputError: the file is missing, is not UTF-8, or has an invalid line.
        TokenizerError: the model's tokenizer is missing or not understood.
        CalibrationError: there is too little text, or the tokenizer does not know its script.
    """
    tokenizer = load_tokenizer(source)
    worded: set[bool] = set()  # whether documents came as text
    trained = recipe.rows + recipe.distill.tokens // recipe.sequence_length
    wanted = max(_SPREAD * recipe.rows, trained)
    try:
        packed = pack_documents(
            _shuffled(_noted(read_documents(path), worded), seed=seed),
            tokenizer,
            sequence_length=recipe.sequence_length,
            separator_id=next(iter(config.eos_token_ids), None),
            vocab_size=config.vocab_size,
            max_tokens=wanted * recipe.sequence_length,
        )
    except TooLittleTextError as error:
        raise _too_little(path, recipe, rows=0) from error
    except InputError as error:
        error.where = error.where or str(path)
        raise
    if len(packed.tokens) < recipe.rows:
        raise _too_little(path, recipe, rows=len(packed.tokens))
    if True in worded and tokenizer.vocab_size > _BYTE_VOCABULARY:
        _check_known(packed.tokens, tokenizer, path)
    return _taken(packed.tokens, recipe, seed=seed)


def _taken(rows: torch.Tensor, recipe: CalibrationRecipe, *, seed: int) -> CalibrationText:
    """Take what a recipe asks for from rows [M, T + 1] of a text, M at least their number.

    They are the same however much more is read for training. Validation rows come from the last
    eighth of where they are taken from, so mostly from other documents than those that fit.
    """
    pool = min(len(rows), _SPREAD * recipe.rows)
    fit_rows = recipe.rows - recipe.validation_rows
    stop = pool - min(max(recipe.validation_rows, pool // _SPREAD), pool - fit_rows)
    long_rows = min(_LONG_ROWS, fit_rows - recipe.search_rows)
    fit = _spread(range(long_rows, stop), fit_rows - long_rows)
    random.Random(seed).shuffle(fit)  # noqa: S311  (an order, not a secret)
    check = _spread(range(stop, pool), recipe.validation_rows)
    return CalibrationText(
        tokens=rows[[*fit, *range(long_rows), *check]],
        validation_rows=recipe.validation_rows,
        long_rows=long_rows,
        training=torch.cat((rows[:stop], rows[pool:]))[:, :-1],
    )


def _spread(rows: range, count: int) -> list[int]:
    """Return so many of some rows, as far apart as they can be."""
    return [rows[(2 * n + 1) * len(rows) // (2 * count)] for n in range(count)]


def _too_little(path: Path, recipe: CalibrationRecipe, *, rows: int) -> CalibrationError:
    return CalibrationError(
        "there is too little text to fit a conversion to",
        where=path,
        expected=f"{recipe.rows * recipe.sequence_length} tokens, as the recipe says",
        found=f"{rows * recipe.sequence_length} tokens in whole sequences",
        hint="Give a longer text, or lower `calibration.tokens` in the recipe.",
    )


def _noted(documents: Iterator[Document], worded: set[bool]) -> Iterator[Document]:
    """Pass documents on, and note whether they are text."""
    for document in documents:
        worded.add(document.text is not None)
        yield document


def _shuffled(documents: Iterator[Document], *, seed: int) -> Iterator[Document]:
    """Yield the documents in groups, each in random order, all as one kind."""
    order = random.Random(seed)  # noqa: S311  (an order, not a secret)
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(replace(document, kind=_KIND))
        size += len(document.text or document.token_ids or ())
        if size >= _SHUFFLED_CHARACTERS:
            order.shuffle(group)
            yield from group
            group, size = [], 0
    order.shuffle(group)
    yield from group


def _check_known(tokens: torch.Tensor, tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a text that falls to bytes: the tokenizer has no tokens for its script."""
    ids, counts = tokens[:_CHECKED_ROWS].unique(return_counts=True)
    nbytes = sum(
        len(tokenizer.token_bytes(token_id)) * count
        for token_id, count in zip(ids.tolist(), counts.tolist(), strict=True)
    )
    mean = nbytes / int(counts.sum())
    if mean < _LEAST_BYTES:
        raise CalibrationError(
            "the tokenizer does not know the words of this text",
            where=path,
            expected=f"at least {_LEAST_BYTES} bytes in a token on average",
            found=f"{mean:.2f}",
            hint="Give a text in a language that the model was trained on.",
        )
