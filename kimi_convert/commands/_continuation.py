"""Load a checkpoint, continue a text with it, and time that: what `generate` and `demo` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to continue, and how tokens are chosen."""

    prompt: str
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    dtype: str = "float32"  # torch's name
    device: str = "cpu"
    backend: str | None = None  # of the kernels; None takes Triton on a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What was generated, and how fast."""

    checkpoint: str
    request: Request
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float  # from the prompt to the last token, without loading

    def to_json(self) -> dict[str, object]:
        """Return the document that `generate --json` prints."""
        return asdict(self)


def continue_text(
    checkpoint: Path, request: Request, *, show: Callable[[Iterator[str]], str]
) -> Continuation:
    """Generate until a token that ends the text, or the most tokens asked for.

    Args:
        checkpoint: of any supported architecture, with its tokenizer files.
        request: what to continue.
        show: takes the pieces of the text as they come, and returns them joined.
    """
    from kimi_convert.checkpoints.dtypes import dtype_from_torch_name, torch_dtype
    from kimi_convert.model.backend import usable_device
    from kimi_convert.model.generation import generate, stream_text
    from kimi_convert.model.loading import load_model
    from kimi_convert.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    prompt_ids = tokenizer.encode(request.prompt)
    model = load_model(
        checkpoint,
        dtype=torch_dtype(dtype_from_torch_name(request.dtype)),
        device=usable_device(request.device),
        backend=request.backend,
    )
    chosen: list[int] = []
    started = time.perf_counter()
    ids = generate(
        model,
        prompt_ids,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        stop_ids=tokenizer.eos_token_ids,
        bos_token_id=tokenizer.bos_token_id,
    )
    text = show(stream_text(tokenizer, _kept(ids, chosen)))
    return Continuation(
        checkpoint=str(checkpoint),
        request=request,
        text=text,
        prompt_tokens=len(prompt_ids),
        new_tokens=len(chosen),
        seconds=time.perf_counter() - started,
    )


def _kept(ids: Iterator[int], chosen: list[int]) -> Iterator[int]:
    for token_id in ids:
        chosen.append(token_id)
        yield token_id
