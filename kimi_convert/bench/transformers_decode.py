"""A process that decodes with transformers when it is told to; `bench.onnx` measures it.

    python -m kimi_convert.bench.transformers_decode CHECKPOINT PROMPT_TOKENS NEW_TOKENS

Each line on standard input is one round; the answer is one line, the seconds of CPU time it took. The
class is named, so no code from the checkpoint runs.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import torch
import transformers


@torch.inference_mode()
def decode_seconds(model: Any, prompt: torch.Tensor, new_tokens: int) -> float:  # noqa: ANN401
    """Return the CPU time of decoding greedily after a prompt [1, T], the prompt's left out."""
    cache = transformers.DynamicCache(config=model.config)
    token = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    started = time.process_time()
    for _ in range(new_tokens):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return time.process_time() - started


def main() -> None:
    """Load, then answer rounds until the input ends."""
    folder, prompt_tokens, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within their own code
        model = transformers.KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.arange(prompt_tokens)[None] % model.config.vocab_size
    decode_seconds(model.eval(), prompt, 1)
    for _ in sys.stdin:
        sys.stdout.write(f"{decode_seconds(model, prompt, new_tokens)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
