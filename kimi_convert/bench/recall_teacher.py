"""Train a small MLA teacher that looks up: `python -m kimi_convert.bench.recall_teacher FOLDER`.

    [--steps N] [--length T] [--seed N]

Small models of text look up little, so a hybrid's lookups cannot be told from theirs. This teacher
learns nothing else: its sequences are random tokens, and about half of each is a copy of what stands
earlier in it, at any distance. Written are the checkpoint (FOLDER/teacher) and two texts of its kind,
`calibration.jsonl` and `heldout.jsonl`. Minutes on one core.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kimi_convert.config.huggingface import parse_config
from kimi_convert.model.mla_transformer import MlaTransformer
from kimi_convert.model.names.layout import expected_entries
from kimi_convert.model.numerics import SERVED

_BYTES = 256
_IDS = (_BYTES // 4, _BYTES // 2)  # that sequences are made of
_BATCH_TOKENS = 2048
_RATE = 2e-3
_WARM_UP = 100
_LONGEST = 24  # tokens that are copied at once, but at most a quarter of the sequence
_COPIED = 0.7  # share of segments that are copies
_SHORT = 32  # tokens of the shortest sequence; looking up is learned on short ones first
_CALIBRATION_ROWS, _HELDOUT_ROWS = 1200, 128
_CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "vocab_size": _BYTES + 3,
    "intermediate_size": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": _BYTES,
    "eos_token_id": _BYTES + 1,
    "pad_token_id": _BYTES + 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 8,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.0,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}


def copying_rows(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return sequences [rows, length] of random segments and of copies of earlier ones."""
    low, high = _IDS
    tokens = torch.randint(low, high, (rows, length), generator=generator)
    longest = min(_LONGEST, length // 4)
    for row in tokens:
        at = longest
        while at < length:
            size = min(_number(longest // 2, longest + 1, generator), length - at)
            if torch.rand((), generator=generator) < _COPIED:
                start = _number(0, at - size + 1, generator)
                row[at : at + size] = row[start : start + size].clone()
            at += size
    return tokens


def trained_teacher(steps: int, length: int, seed: int) -> MlaTransformer:
    """Train from random weights; the loss of every hundredth step goes to stderr."""
    torch.manual_seed(seed)
    config = parse_config(_CONFIG)
    model = MlaTransformer(config, SERVED, dtype=torch.float32)
    _initialise(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rate = _RATE * min(1.0, (step + 1) / _WARM_UP) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        now = _number(_SHORT, max(_SHORT, length) + 1, generator)
        tokens = copying_rows(_BATCH_TOKENS // now, now + 1, generator)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            sys.stderr.write(f"step {step}: loss {loss.item():.3f}\n")
    return model


def _initialise(model: MlaTransformer) -> None:
    """Draw weights so that the stream begins as the tokens, to which each layer adds little."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            torch.nn.init.ones_(parameter)
            continue
        std = 1.0 if name.startswith("embed.") else parameter.shape[-1] ** -0.5
        added = name.endswith(("mla.o.weight", "mlp.down.weight"))
        small = (2 * model.config.num_layers) ** -0.5 if added else 1.0
        torch.nn.init.normal_(parameter, std=small * std)


def write_teacher(model: MlaTransformer, folder: Path) -> None:
    """Write the checkpoint, with a tokenizer of single bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG, indent=2), encoding="utf-8")
    tensors = {
        entry.name: model.get_parameter(entry.param).detach().bfloat16()
        for entry in expected_entries(model.config)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ranks = (base64.b64encode(bytes((byte,))).decode() + f" {byte}\n" for byte in range(_BYTES))
    (folder / "tiktoken.model").write_text("".join(ranks), encoding="ascii")
    marks = ("[BOS]", "[EOS]", "[PAD]")
    added = {str(_BYTES + n): {"content": mark} for n, mark in enumerate(marks)}
    document = {"added_tokens_decoder": added, "bos_token": marks[0], "eos_token": marks[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(document), encoding="utf-8")


def write_text(path: Path, rows: torch.Tensor) -> None:
    """Write sequences as token ids, one document each."""
    lines = (json.dumps({"token_ids": row}) + "\n" for row in rows.tolist())
    path.write_text("".join(lines), encoding="utf-8")


def _number(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write everything."""
    parser = argparse.ArgumentParser(prog="python -m kimi_convert.bench.recall_teacher")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    model = trained_teacher(given.steps, given.length, given.seed)
    write_teacher(model, given.folder / "teacher")
    generator = torch.Generator().manual_seed(given.seed + 1)
    texts = {"calibration.jsonl": _CALIBRATION_ROWS, "heldout.jsonl": _HELDOUT_ROWS}
    for name, rows in texts.items():
        # One token short: with the mark between documents a row is a document.
        write_text(given.folder / name, copying_rows(rows, given.length, generator))
    return 0


if __name__ == "__main__":
    sys.exit(main())
