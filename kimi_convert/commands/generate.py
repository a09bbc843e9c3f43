"""`kimi-convert generate`: let a checkpoint continue a text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kimi_convert.commands._continuation import Request, continue_text
from kimi_convert.commands._numbers import seconds_text
from kimi_convert.commands._options import (
    BackendOpt,
    CheckpointArg,
    DeviceOpt,
    Dtype,
    JsonOpt,
    ModelDtypeOpt,
    QuietOpt,
    VerboseOpt,
)
from kimi_convert.commands._output import Output
from kimi_convert.errors import InputError

EXAMPLE = 'kimi-convert generate ./hybrid --prompt "The history of" --max-new-tokens 32'

PromptOpt = Annotated[
    str,
    typer.Option("--prompt", help="Text to continue; - reads standard input.", show_default=False),
]
MaxNewTokensOpt = Annotated[int, typer.Option(help="The most tokens to add.")]
TemperatureOpt = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopPOpt = Annotated[float, typer.Option(help="Sample from this share of the probability.")]
TopKOpt = Annotated[
    int | None, typer.Option(help="Sample from so many likeliest tokens.", show_default=False)
]
SeedOpt = Annotated[int, typer.Option(help="Of the sampling.")]


def generate(
    checkpoint: CheckpointArg,
    prompt: PromptOpt,
    max_new_tokens: MaxNewTokensOpt = 64,
    temperature: TemperatureOpt = 0.0,
    top_p: TopPOpt = 1.0,
    top_k: TopKOpt = None,
    seed: SeedOpt = 0,
    dtype: ModelDtypeOpt = Dtype.FLOAT32,
    device: DeviceOpt = "cpu",
    backend: BackendOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = False,
) -> None:
    """Continue a text. What is generated goes to standard output as it comes."""
    output = Output(as_json=as_json, quiet=quiet, verbose=verbose)
    request = Request(
        prompt=_read_prompt(prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        dtype=dtype.value,
        device=device,
        backend=None if backend is None else backend.value,
    )
    made = continue_text(checkpoint, request, show=output.stream)
    output.document(made)
    output.note(f"{made.new_tokens} tokens in {seconds_text(made.seconds)}")


def _read_prompt(text: str) -> str:
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            "the prompt is not text", where="standard input", expected="UTF-8", found=error.reason
        ) from error
