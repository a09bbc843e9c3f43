"""Let a model continue a text: greedy or sampled, one sequence, one token at a time.

Sampling is reproducible: logits go to the CPU in fp64 and meet a generator of their own, so that
a seed gives the same ids whatever else draws random numbers.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.errors import CheckpointError, UsageError
from kimi_convert.model.cache import ModelCache, new_cache
from kimi_convert.model.tokenizer import Tokenizer

# Bounds the logits of a prefill, of which only the last are used: 512 x 163840 fp32 are 336 MB.
_PREFILL_TOKENS = 512


class CausalModel(Protocol):
    """What generation needs of a model."""

    @property
    def config(self) -> ModelConfig:
        """Sizes, and the kinds of its layers' caches."""
        ...

    @property
    def embed(self) -> nn.Embedding:
        """Its embedding, whose weight has the dtype and the device of the activations."""
        ...

    def __call__(self, tokens: torch.Tensor, cache: ModelCache | None = None) -> torch.Tensor:
        """Return logits [B, T, vocab] for tokens [B, T], continuing from a cache."""
        ...


def generate(
    model: CausalModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    bos_token_id: int | None = None,
) -> Iterator[int]:
    """Yield the ids that continue a prompt, as they are chosen.

    Args:
        model: of any family; its cache is made and kept here.
        prompt_ids: what to continue; nothing is put before it.
        max_new_tokens: the most ids that are yielded.
        temperature: 0 takes the likeliest token; else what logits are divided by.
        top_p: in (0, 1]: sample from the fewest likeliest tokens that have this probability.
        top_k: sample from so many likeliest tokens; applied before `top_p`.
        seed: of the generator that samples.
        stop_ids: generation ends before the first of these, which is not yielded.
        bos_token_id: what an empty prompt starts from.

    Raises:
        UsageError: an argument is out of range, or there is nothing to start from.
        CheckpointError: while generating, if the model gives NaN or infinity.
    """
    sampling = _Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    if max_new_tokens < 1:
        raise UsageError(
            "max_new_tokens is not valid", expected="at least 1", found=max_new_tokens
        )
    start = list(prompt_ids) or ([] if bos_token_id is None else [bos_token_id])
    if not start:
        raise UsageError(
            "the prompt is empty, and the tokenizer has no token that starts a text",
            hint="Give a prompt of at least one token.",
        )
    vocab_size = model.config.vocab_size
    outside = next((token_id for token_id in start if not 0 <= token_id < vocab_size), None)
    if outside is not None:
        raise UsageError(
            "the prompt has an id that the model does not know",
            expected=f"0 to {vocab_size - 1}",
            found=outside,
            hint="Encode the prompt with the tokenizer of this checkpoint.",
        )
    generator = torch.Generator().manual_seed(seed)
    ids = _continue(model, start, sampling=sampling, generator=generator)
    return _until(ids, stop_ids=frozenset(stop_ids), limit=max_new_tokens)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids in pieces, each as soon as its characters are whole.

    The pieces joined are `tokenizer.decode` of all ids. No piece is empty.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token_id in ids:
        piece = decoder.decode(tokenizer.token_bytes(token_id))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampling:
    """How one token is chosen from its logits."""

    temperature: float
    top_p: float
    top_k: int | None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(
                "temperature is not valid", expected="a number from 0 on", found=self.temperature
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(
                "top_p is not valid", expected="above 0 and at most 1", found=self.top_p
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError("top_k is not valid", expected="at least 1", found=self.top_k)

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """Choose from logits [vocab] fp64 on the CPU; of equals the first is the likeliest."""
        if self.temperature == 0:
            return int(logits.argmax())
        ordered, ids = logits.sort(descending=True, stable=True)
        ordered = ordered[: self.top_k]
        # The largest is subtracted first, so that no temperature, however small, overflows.
        probabilities = ((ordered - ordered[0]) / self.temperature).softmax(dim=0)
        before = probabilities.cumsum(dim=0) - probabilities
        kept = probabilities[before < self.top_p]
        return int(ids[torch.multinomial(kept, 1, generator=generator)])


def _continue(
    model: CausalModel, start: list[int], *, sampling: _Sampling, generator: torch.Generator
) -> Generator[int]:
    """Yield ids without end."""
    weight = model.embed.weight
    cache = new_cache(model.config, 1, dtype=weight.dtype, device=weight.device)
    pending = start
    while True:
        chosen = sampling.choose(_last_logits(model, pending, cache), generator)
        yield chosen
        pending = [chosen]


def _until(ids: Iterator[int], *, stop_ids: frozenset[int], limit: int) -> Generator[int]:
    for count, token_id in enumerate(ids, start=1):
        if token_id in stop_ids:
            return
        yield token_id
        if count == limit:
            return


# Not around the generators above: between their steps, the mode would leak into the caller.
@torch.inference_mode()
def _last_logits(model: CausalModel, ids: list[int], cache: ModelCache) -> torch.Tensor:
    """Run ids through the model and return the logits [vocab] fp64 after the last, on the CPU."""
    tokens = torch.tensor([ids], device=model.embed.weight.device)
    *_, logits = (model(chunk, cache)[0, -1] for chunk in tokens.split(_PREFILL_TOKENS, dim=1))
    logits = logits.to(device="cpu", dtype=torch.float64)
    if not logits.isfinite().all():
        raise CheckpointError(
            "the model gives logits that are not finite",
            where=f"token {cache.position}",
            hint="Its weights may hold NaN or infinity: run `kimi-convert validate`.",
        )
    return logits
