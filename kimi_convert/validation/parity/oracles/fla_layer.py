"""flash-linear-attention's KDA layer on a GPU, in our model: the mixers are its, all else is ours, in plain torch.

In fp32. Its kernels multiply fp32 in TF32 by themselves, whose 10 bits would need a bound of their
own: they are told to multiply what they are given. What was compiled otherwise is not used. Nor are
they tuned, which takes minutes: every choice of tiles computes the same.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from kimi_convert.kernels.backend import Backend
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.kda import KdaForm, KimiDeltaAttention
from kimi_convert.validation.parity.oracles.fla_mixer import exchange_mixer
from kimi_convert.validation.parity.oracles.process import DECODE, OracleRequest, answer_request
from kimi_convert.validation.parity.torch_model import (
    TorchRun,
    continue_greedily,
    one_piece,
    single_tokens,
    trace_checkpoint,
)
from kimi_convert.validation.parity.trace import Trace


def trace_with_fla(request: OracleRequest) -> dict[str, Trace]:
    """Run a request."""
    folder = Path(request.folder)
    with TemporaryDirectory(prefix="kimi-convert-fla-") as compiled:
        _multiply_in_fp32(compiled)
        _take_the_first_tiles()
        greedy = None
        if request.new_tokens:
            greedy = continue_greedily(folder, request.prompt, request.new_tokens, _run())
        return {
            form: Trace(
                trace_checkpoint(folder, request.token_ids, _run(decode=form == DECODE)).values,
                greedy,
            )
            for form in request.forms
        }


def new_layer(ours: KimiDeltaAttention) -> nn.Module:
    """Return its layer in the sizes and on the device of ours; its weights mean nothing yet."""
    with ours.q.weight.device:
        return import_module("fla.layers.kda").KimiDeltaAttention(
            hidden_size=ours.q.in_features,
            num_heads=ours.num_heads,
            head_dim=len(ours.o_norm.weight),
            conv_size=ours.q_conv.weight.shape[-1],
            norm_eps=ours.o_norm.eps,
            layer_idx=0,
        )


def _run(*, decode: bool = False) -> TorchRun:
    return TorchRun(
        kda_form=KdaForm.CHUNK,
        pieces=single_tokens if decode else one_piece,
        device="cuda",
        backend=Backend.TORCH,
        exchange=_exchange,
    )


def _exchange(layer: DecoderLayer) -> None:
    exchange_mixer(layer, new_layer)


def _multiply_in_fp32(compiled: str) -> None:
    """Have its kernels multiply fp32 as such, and keep them from what is compiled elsewhere."""
    triton = import_module("triton")
    triton.knobs.language.fp32_default = "ieee"
    triton.knobs.cache.dir = compiled
    ieee = triton.language.constexpr("ieee")
    vars(import_module("fla.ops.kda.chunk_intra"))["SOLVE_TRIL_DOT_PRECISION"] = ieee
    torch.backends.cuda.matmul.allow_tf32 = False


def _take_the_first_tiles() -> None:
    """Have no kernel tried out in all the shapes of tiles that it is written for."""
    tuner = import_module("triton.runtime.autotuner").Autotuner
    every = tuner.prune_configs
    tuner.prune_configs = lambda kernel, arguments: every(kernel, arguments)[:1]


if __name__ == "__main__":
    answer_request(trace_with_fla, sys.argv[1:])
