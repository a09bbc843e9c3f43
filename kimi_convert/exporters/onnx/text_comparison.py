"""How near a graph is to its checkpoint: a text run through both.

The reference model runs layer by layer, so that memory holds one layer of it; the graph runs in ONNX
Runtime as a user runs it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from kimi_convert.config.huggingface import read_config
from kimi_convert.config.progress import ProgressCallback, ProgressEvent, ignore_progress
from kimi_convert.errors import VerificationError
from kimi_convert.exporters.onnx.session import OnnxSession
from kimi_convert.model.loading import open_layers
from kimi_convert.model.text import pack_documents, read_documents
from kimi_convert.model.tokenizer import load_tokenizer, tokenizer_files

TEXT_TOKENS, TEXT_SEQUENCE = 4096, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TextComparison:
    """What a graph and its checkpoint make of a text; losses are nats per token."""

    text: Path
    tokens: int
    checkpoint_loss: float
    graph_loss: float
    logits_error: float  # largest difference over the largest logit
    top1_agreement: float  # share of positions at which both expect the same token

    @property
    def loss_increase(self) -> float:
        """Nats per token that the graph is behind."""
        return self.graph_loss - self.checkpoint_loss

    def to_json(self) -> dict[str, object]:
        """Return the fields and the increase."""
        return {**asdict(self), "text": str(self.text), "loss_increase": self.loss_increase}


@torch.inference_mode()
def compare_on_text(
    checkpoint: Path,
    graph: Path,
    text: Path,
    *,
    max_tokens: int = TEXT_TOKENS,
    threads: int | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> TextComparison:
    """Run the first tokens of a text through the checkpoint and through the graph.

    Args:
        checkpoint: the folder that was exported, with its tokenizer.
        graph: file or folder of the graph, which gives logits of every position.
        text: `.txt`, or `.jsonl` with a "text" or token ids per line.
        max_tokens: how much of it.
        threads: of ONNX Runtime.
        on_progress: told of every layer and every sequence.

    Raises:
        InputError: the text or the tokenizer is not valid, or too short.
        CheckpointError: the checkpoint or the graph does not load.
        VerificationError: the graph gives logits that are not finite.
    """
    tokens = _read_tokens(checkpoint, text, max_tokens)  # [R, T + 1]
    session = OnnxSession(graph, threads=threads)
    sums = torch.zeros(3, dtype=torch.float64)  # of losses, and of equal choices
    error, largest = 0.0, 0.0
    with open_layers(checkpoint) as layers:
        hidden = layers.embedding()(tokens[:, :-1])
        for layer_idx in range(layers.config.num_layers):
            on_progress(ProgressEvent("reference", layer_idx, layers.config.num_layers, "layers"))
            hidden = layers.layer(layer_idx)(hidden)
        head = layers.head()
        for row, states in enumerate(hidden):
            on_progress(ProgressEvent("graph", row, len(tokens), "sequences"))
            wanted = head(states)  # [T, vocab]
            found = torch.from_numpy(_graph_logits(session, tokens[row, :-1].numpy()))
            following = tokens[row, 1:]
            sums[0] += F.cross_entropy(wanted, following, reduction="sum")
            sums[1] += F.cross_entropy(found, following, reduction="sum")
            sums[2] += (wanted.argmax(-1) == found.argmax(-1)).sum()
            error = max(error, float((wanted - found).abs().max()))
            largest = max(largest, float(wanted.abs().max()))
    checkpoint_loss, graph_loss, agreement = (sums / tokens[:, 1:].numel()).tolist()
    return TextComparison(
        text=text,
        tokens=tokens[:, 1:].numel(),
        checkpoint_loss=checkpoint_loss,
        graph_loss=graph_loss,
        logits_error=error / largest,
        top1_agreement=agreement,
    )


def _graph_logits(session: OnnxSession, row: np.ndarray) -> np.ndarray:
    logits = session.run(row[None], session.new_states(1))[0]
    if not np.isfinite(logits).all():
        raise VerificationError(
            "the graph gives logits that are not finite",
            hint="Export with --precision fp32; fp16 overflows above 65504.",
        )
    return logits


def _read_tokens(checkpoint: Path, text: Path, max_tokens: int) -> torch.Tensor:
    """Return ids [R, T + 1] of whole sequences."""
    tokenizer = load_tokenizer(checkpoint) if tokenizer_files(checkpoint) else None
    separators = tokenizer.eos_token_ids if tokenizer else ()
    return pack_documents(
        read_documents(text),
        tokenizer,
        sequence_length=TEXT_SEQUENCE,
        separator_id=separators[0] if separators else None,
        vocab_size=read_config(checkpoint).vocab_size,
        max_tokens=max_tokens,
    ).tokens
