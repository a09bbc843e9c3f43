"""An exported graph in onnxruntime-genai, which keeps the states itself: logits and a continuation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime_genai
import torch

from kimi_convert.validation.parity.oracles.onnx_runtime import coarsest_dtype
from kimi_convert.validation.parity.oracles.process import (
    DECODE,
    OracleRequest,
    answer_request,
    decline,
)
from kimi_convert.validation.parity.stages import LOGITS_PROBE
from kimi_convert.validation.parity.trace import Greedy, Trace

genai: Any = onnxruntime_genai  # its classes are made in C++, without types


def trace_with_genai(request: OracleRequest) -> dict[str, Trace]:
    """Run each sequence token by token, as the runtime does when it writes."""
    if coarsest_dtype(request) is not torch.float32:
        decline(
            "what experts it chooses is not seen, and narrower weights choose others in near ties"
        )
    model = genai.Model(request.artifact)
    rows = [_logits(_generator(model, len(ids)), ids) for ids in request.tokens]
    values = {LOGITS_PROBE: torch.stack(rows)}
    return {DECODE: Trace(values, _continue(model, request))}


def _generator(model: Any, length: int) -> Any:  # noqa: ANN401  (the library has no types)
    parameters = genai.GeneratorParams(model)
    # One more than is asked for: at its end a generator takes no more tokens.
    parameters.set_search_options(max_length=length + 1)
    return genai.Generator(model, parameters)


def _logits(generator: Any, ids: Sequence[int]) -> torch.Tensor:  # noqa: ANN401
    """Return logits [T, vocab] after each token."""
    rows: list[torch.Tensor] = []
    for token_id in ids:
        generator.append_tokens(np.array([[token_id]], dtype=np.int32))
        rows.append(_last(generator))
    return torch.stack(rows)


def _last(generator: Any) -> torch.Tensor:  # noqa: ANN401
    found = np.array(generator.get_logits(), dtype=np.float32)
    return torch.from_numpy(found.reshape(-1, found.shape[-1])[-1].copy())


def _continue(model: Any, request: OracleRequest) -> Greedy | None:  # noqa: ANN401
    generator = _generator(model, len(request.prompt) + request.new_tokens)

    # Chosen by whoever asks: the runtime's own choice would end at the token that ends a text.
    def step(ids: list[int]) -> torch.Tensor:
        generator.append_tokens(np.array([ids], dtype=np.int32))
        return _last(generator)

    return request.continued(step)


if __name__ == "__main__":
    answer_request(trace_with_genai, sys.argv[1:])
