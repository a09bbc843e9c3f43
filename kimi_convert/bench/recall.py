"""How far back hybrids can look up: `python -m kimi_convert.bench.recall TEACHER HYBRID ...`.

    [--text FILE] [--contexts N ...] [--rows N]

A random span stands at the beginning of a context, text follows, and the span comes again at its
end: what is asked lies almost a context back. Beside it the KL to the teacher on text at the longest
context, of the tokens in its last half. Meant for hybrids of one teacher that keep other layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kimi_convert.checkpoints.examples import heldout_text
from kimi_convert.config.huggingface import read_config
from kimi_convert.errors import InputError, KimiConvertError
from kimi_convert.model.loading import open_layers
from kimi_convert.model.recall import SizedProbe, copying_probe
from kimi_convert.model.text import PackedText, pack_documents, read_documents
from kimi_convert.model.tokenizer import load_tokenizer
from kimi_convert.validation.metrics import forward_kl, token_slices
from kimi_convert.validation.probe_streams import ProbeStreams

_SPAN = 32
_ROWS = 32
_CONTEXTS = (128, 256, 512, 1024)
_BATCH_ROWS = 4
_TEXT_TOKENS = 16_384
_LOGITS_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """One hybrid and its teacher."""

    name: str
    kept: tuple[int, ...]  # layers that stay MLA
    copied: Mapping[int, tuple[float, float]]  # context -> share of answers: hybrid's, teacher's
    kl: float  # nats per token, in the last half of the longest context


def probes_at(
    text: PackedText, contexts: Sequence[int], *, rows: int, marks: frozenset[int]
) -> list[SizedProbe]:
    """Return a copying probe for each context, with text between the two spans.

    Args:
        text: rows as long as the longest context.
        contexts: tokens, each above twice the span.
        rows: sequences in each probe.
        marks: ids that no span is drawn from.
    """
    ids = torch.tensor([token for token in text.tokens.unique().tolist() if token not in marks])
    chosen = torch.arange(rows) % len(text.tokens)
    return [
        SizedProbe(
            name="copying",
            size=context,
            probe=copying_probe(
                ids,
                span=_SPAN,
                rows=rows,
                seed=context,
                between=text.tokens[chosen, : context - 2 * _SPAN],
            ),
        )
        for context in contexts
    ]


@torch.inference_mode()
def reach_of(
    teacher_folder: Path, folder: Path, text: PackedText, probes: Sequence[SizedProbe]
) -> Reach:
    """Run both models layer by layer over probes and text."""
    tokens = text.tokens[:, :-1]
    with open_layers(teacher_folder) as teacher, open_layers(folder) as student:
        streams = ProbeStreams(probes, _BATCH_ROWS)
        streams.embed(student.embedding(), teacher.embedding(), torch.device("cpu"))
        guide, own = teacher.embedding()(tokens), student.embedding()(tokens)
        for layer_idx in range(teacher.config.num_layers):
            theirs, ours = teacher.layer(layer_idx), student.layer(layer_idx)
            streams.advance(ours, theirs)
            for stream, layer in ((guide, theirs), (own, ours)):
                for rows in stream.split(_BATCH_ROWS):
                    rows.copy_(layer(rows))
        heads = student.head(), teacher.head()
        results = list(streams.results(*heads))
        half = slice(tokens.shape[1] // 2, None)
        last = own[:, half].flatten(0, 1), guide[:, half].flatten(0, 1)
        total = 0.0
        vocab = teacher.config.vocab_size
        for run in token_slices(len(last[0]), vocab_size=vocab, max_bytes=_LOGITS_BYTES):
            found, expected = (
                head(hidden[run]).log_softmax(-1) for head, hidden in zip(heads, last, strict=True)
            )
            total += forward_kl(expected, found).sum().item()
    copied = {one.size: (one.student, one.teacher or 0.0) for one in results}
    return Reach(
        name=folder.name, kept=student.config.mla_layers, copied=copied, kl=total / len(last[0])
    )


def table_of(found: Sequence[Reach]) -> Iterator[str]:
    """Yield a table of all hybrids below their teacher."""
    contexts = list(found[0].copied)
    yield f"| kept | {' | '.join(f'{n} back' for n in contexts)} | KL, last half |"
    yield "|" + "---|" * (len(contexts) + 2)
    teacher = (f"{found[0].copied[n][1]:.1%}" for n in contexts)
    yield f"| teacher | {' | '.join(teacher)} | - |"
    for one in found:
        shares = (f"{one.copied[n][0]:.1%}" for n in contexts)
        yield f"| {', '.join(map(str, one.kept))} ({one.name}) | {' | '.join(shares)} | {one.kl:.3f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table; exit codes are those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m kimi_convert.bench.recall")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("hybrids", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, default=heldout_text())
    parser.add_argument("--contexts", type=int, nargs="+", default=list(_CONTEXTS))
    parser.add_argument("--rows", type=int, default=_ROWS)
    given = parser.parse_args(arguments)
    try:
        for line in _lines(given):
            sys.stdout.write(f"{line}\n")
    except KimiConvertError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _lines(given: argparse.Namespace) -> Iterator[str]:
    if min(given.contexts) <= 2 * _SPAN:
        raise InputError(
            "a context is too short",
            expected=f"more than {2 * _SPAN} tokens",
            found=min(given.contexts),
        )
    config, tokenizer = read_config(given.teacher), load_tokenizer(given.teacher)
    text = pack_documents(
        read_documents(given.text),
        tokenizer,
        sequence_length=max(given.contexts),
        separator_id=next(iter(config.eos_token_ids), None),
        max_tokens=_TEXT_TOKENS,
    )
    marks = {config.bos_token_id, config.pad_token_id, *config.eos_token_ids}
    known = frozenset(mark for mark in marks if mark is not None)
    probes = probes_at(text, given.contexts, rows=given.rows, marks=known)
    found = [reach_of(given.teacher, hybrid, text, probes) for hybrid in given.hybrids]
    return table_of(found)


if __name__ == "__main__":
    sys.exit(main())
