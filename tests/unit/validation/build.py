"""Checkpoints and texts to validate, and the records of hashes that lie beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kimi_convert.config.progress import ignore_progress
from kimi_convert.validation.options import Check
from tests.tiny import tiny_config, write_tiny_checkpoint

TEACHER = tiny_config("deepseek_v3", vocab_size=300)
HYBRID = tiny_config("kimi_linear", vocab_size=300)
NOTHING = frozenset[Check]()
ALL = frozenset(Check)


def silent(event):
    ignore_progress(event)


def write_hybrid(folder: Path, *, seed: int = 0, num_shards: int = 2) -> Path:
    return write_tiny_checkpoint(folder, HYBRID, seed, num_shards=num_shards)


def edit_tensors(folder: Path, edit) -> Path:
    """Let `edit` change the tensors of every file in place."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def switch_off_mixers(folder: Path) -> Path:
    """Zero the output projection of every KDA layer."""
    outputs = {f"model.layers.{i}.self_attn.o_proj.weight" for i in HYBRID.kda_layers}

    def zero(tensors):
        for name in outputs & tensors.keys():
            tensors[name].zero_()

    return edit_tensors(folder, zero)


def record_hashes(folder: Path, name: str = "conversion.json") -> dict:
    """Write a conversion.json with the hashes of everything that is there now."""
    files, tensors = {}, {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        files[path.name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118  (not a dict)
                    stored = shard.get_tensor(key).contiguous().view(torch.uint8)
                    digest = hashlib.sha256(stored.numpy().tobytes()).hexdigest()
                    tensors[key] = {"op": "copy", "sources": [key], "sha256": digest}
    record = {"format": 1, "recipe": {"seed": 3}, "files": files, "tensors": tensors}
    write_json(folder / name, record)
    return record


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


def write_token_ids(path: Path, *, rows: dict[str, int], vocab_size: int = 300) -> Path:
    """Write one document of random ids per kind, `rows` of 16 tokens and one more."""
    generator = torch.Generator().manual_seed(5)
    lines = [
        {
            "kind": kind,
            "token_ids": torch.randint(
                vocab_size, (16 * count + 1,), generator=generator
            ).tolist(),
        }
        for kind, count in rows.items()
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path
