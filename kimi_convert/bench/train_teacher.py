"""Train a small teacher of another shape than the example's: `python -m kimi_convert.bench.train_teacher`.

    OUT [--preset wide | deep] [--layers N] [--hidden N] [--heads N] [--head-dim N] [--q-lora-rank N]
    [--eps X] [--seed N] [--tokens N] [--text FILE_OR_FOLDER ...] [--device cuda]

A recipe for conversions must not be fitted to one checkpoint. This makes others to check it on: real
MLA models in the format of DeepSeek-V3, with the example's tokenizer, in minutes on a GPU. Text that
the quality bench judges on is left out of what they are trained on, wherever it turns up.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from kimi_convert.bench.teacher_text import training_tokens
from kimi_convert.checkpoints.examples import calibration_text, example_checkpoint, heldout_text
from kimi_convert.config.huggingface import parse_config
from kimi_convert.conversion.calibration.captured import CapturedStep, Rates
from kimi_convert.errors import KimiConvertError, OutputError
from kimi_convert.model.mla_transformer import MlaTransformer
from kimi_convert.model.moe import Router
from kimi_convert.model.names.layout import expected_entries
from kimi_convert.model.tokenizer import load_tokenizer

PRESETS: dict[str, dict[str, object]] = {
    # More and narrower heads, fewer layers.
    "wide": {
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "rms_norm_eps": 1e-6,
    },
    # More layers, low-rank queries, more experts.
    "deep": {
        "num_hidden_layers": 12,
        "hidden_size": 320,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "q_lora_rank": 128,
        "kv_lora_rank": 96,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "rms_norm_eps": 1e-6,
    },
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_RATE, _FINAL_RATE = 2e-3, 0.05
_WARM_UP = 200
_BETAS, _WEIGHT_DECAY, _CLIP = (0.9, 0.95), 0.1, 1.0
_BIAS_STEP = 1e-3  # of a router's correction bias, towards equal loads
_TOLD_EVERY = 200  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How much is trained."""

    steps: int
    rows: int  # sequences of a step
    length: int  # tokens of a sequence
    seed: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write; exit codes are those of the command line."""
    given = _arguments(arguments)
    try:
        if given.output.exists():
            raise OutputError("the output is there already", where=given.output)
        _run(given)
    except KimiConvertError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _run(given: argparse.Namespace) -> None:
    document = _config(given)
    tokenizer = load_tokenizer(example_checkpoint())
    separator = int(str(document["eos_token_id"]))
    tokens = training_tokens(given.text, heldout_text(), tokenizer, separator_id=separator)
    sys.stderr.write(f"{len(tokens)} tokens of text\n")
    schedule = Schedule(
        steps=max(1, given.tokens // (given.rows * given.length)),
        rows=given.rows,
        length=given.length,
        seed=given.seed,
    )
    model = new_model(document, seed=given.seed).to(given.device)
    train(model, tokens.to(given.device), schedule)
    write(model, document, given.output)


def new_model(document: dict[str, object], *, seed: int) -> MlaTransformer:
    """Return a model with drawn weights, fp32: normal of 0.02, what ends in the stream smaller."""
    torch.manual_seed(seed)
    config = parse_config(document)
    model = MlaTransformer(config, dtype=torch.float32)
    into_stream = 0.02 / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.constant_(parameter, 0.0 if name.endswith("router.bias") else 1.0)
        else:
            writes = name.endswith((".o.weight", ".down", ".down.weight"))
            nn.init.normal_(parameter, std=into_stream if writes else 0.02)
        parameter.requires_grad_(not name.endswith("router.bias"))
    return model


def train(model: MlaTransformer, tokens: torch.Tensor, schedule: Schedule) -> list[float]:
    """Train on rows from anywhere in a run of tokens [n]; return the loss every so many steps."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    on_gpu = tokens.is_cuda
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": vectors}],
        lr=_RATE,
        betas=_BETAS,
        weight_decay=0.0,
        fused=on_gpu,
        capturable=on_gpu,
    )
    loads = [_Load(module) for module in model.modules() if isinstance(module, Router)]

    def update(rows: torch.Tensor) -> torch.Tensor:
        loss = _loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *vectors], _CLIP)
        optimizer.step()
        for load in loads:
            load.balance()
        return loss

    rates, take = Rates(optimizer, tokens.device), CapturedStep(update, tokens.device)
    draws = torch.Generator(tokens.device).manual_seed(schedule.seed)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(schedule.steps):
        rates.scale(_share(step, schedule.steps))
        loss = take(_rows(tokens, schedule, draws))
        if step % _TOLD_EVERY == 0 or step == schedule.steps - 1:
            losses.append(float(loss))
            seconds = time.monotonic() - started
            sys.stderr.write(f"step {step}: loss {losses[-1]:.3f}, {seconds:.0f} s\n")
    return losses


def write(model: MlaTransformer, document: dict[str, object], output: Path) -> None:
    """Write a bf16 checkpoint with the example's tokenizer; routers' biases stay fp32."""
    output.mkdir(parents=True)
    state = model.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for entry in expected_entries(model.config):
        if entry.expert_idx is None:
            value = state[entry.param]
        else:
            stack = entry.fill(entry.template.replace(".{expert}", "").removesuffix(".weight"))
            value = state[stack][entry.expert_idx]
        dtype = torch.float32 if entry.param.endswith("router.bias") else torch.bfloat16
        tensors[entry.name] = value.detach().to("cpu", dtype).contiguous()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name in _TOKENIZER:
        shutil.copy(example_checkpoint() / name, output)


class _Load:
    """Keeps the experts of a router equally busy: arXiv 2412.19437, section 2.1.2."""

    def __init__(self, router: Router) -> None:
        self.bias, self.count = router.bias, len(router.weight)
        self.chosen = torch.empty(0)
        router.register_forward_hook(self._note)

    def _note(self, _: nn.Module, __: object, routing: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.chosen = routing[1].flatten()

    @torch.no_grad()
    def balance(self) -> None:
        """Move every expert's bias a step towards the mean load."""
        if self.bias is not None:
            # Not bincount, which waits for the device.
            loads = self.bias.new_zeros(self.count)
            loads.scatter_add_(0, self.chosen, torch.ones_like(self.chosen, dtype=loads.dtype))
            self.bias += _BIAS_STEP * (loads.mean() - loads).sign()


def _rows(tokens: torch.Tensor, schedule: Schedule, draws: torch.Generator) -> torch.Tensor:
    """Draw rows [B, T + 1]."""
    last = len(tokens) - schedule.length - 1
    first = torch.randint(last, (schedule.rows, 1), generator=draws, device=tokens.device)
    return tokens[first + torch.arange(schedule.length + 1, device=tokens.device)].long()


def _loss(model: MlaTransformer, rows: torch.Tensor) -> torch.Tensor:
    with _autocast(rows.device):
        logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _share(step: int, steps: int) -> float:
    warm_up = min(_WARM_UP, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1))
    return _FINAL_RATE + (1 - _FINAL_RATE) * cosine


def _config(given: argparse.Namespace) -> dict[str, object]:
    """Return the example's config.json with the preset's fields, then those of the command line."""
    text = (example_checkpoint() / "config.json").read_text(encoding="utf-8")
    document = {**json.loads(text), **PRESETS.get(given.preset, {})}
    fields = {
        "num_hidden_layers": given.layers,
        "hidden_size": given.hidden,
        "num_attention_heads": given.heads,
        "num_key_value_heads": given.heads,
        "qk_nope_head_dim": given.head_dim,
        "v_head_dim": given.head_dim,
        "q_lora_rank": given.q_lora_rank,
        "rms_norm_eps": given.eps,
    }
    return document | {name: value for name, value in fields.items() if value is not None}


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kimi_convert.bench.train_teacher")
    parser.add_argument("output", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS))
    for name in ("layers", "hidden", "heads", "head-dim", "q-lora-rank"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--eps", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--text", type=Path, nargs="+", default=[calibration_text()])
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
