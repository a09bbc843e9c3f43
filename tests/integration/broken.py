"""Checkpoint folders that are wrong in one way each, made from a good tiny one."""

from __future__ import annotations

import json
import struct

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.model.tokenizer_folders import write_tiktoken_folder

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
LAST = "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"

LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"


def good_source(folder):
    """Write a model with a tokenizer, so that nothing but what is broken later can be at fault."""
    write_tiny_checkpoint(folder, tiny_config("deepseek_v3", vocab_size=300))
    return write_tiktoken_folder(folder)


def truncated_shard(folder):
    path = folder / LAST
    path.write_bytes(path.read_bytes()[:-100])


def overlapping_tensors(folder):
    """Let the last tensor of a file start inside the one before it, in a header of equal size."""
    path = folder / LAST
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    by_place = sorted(
        (entry for name, entry in header.items() if name != "__metadata__"),
        key=lambda entry: entry["data_offsets"],
    )
    start, end = by_place[-1]["data_offsets"]
    by_place[-1]["data_offsets"] = [start - 4, end - 4]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size : -4])


def lfs_pointer(folder):
    (folder / FIRST).write_text(LFS_POINTER)


def index_outside_the_folder(folder):
    (folder.parent / "secret.safetensors").write_bytes((folder / LAST).read_bytes())
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        name: "../secret.safetensors" if shard == LAST else shard
        for name, shard in index["weight_map"].items()
    }
    (folder / INDEX).write_text(json.dumps(index))


def missing_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.pop(NORM))


def extra_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.update(surprise=torch.ones(2)))


def nan_weight(folder):
    change_tensors(folder, lambda tensors: tensors[NORM].__setitem__(0, torch.nan))


def nan_in_a_mixer(folder):
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    change_tensors(folder, lambda tensors: tensors[name].__setitem__((0, 0), torch.nan))


def infinite_expert(folder):
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors[name].__setitem__((0, 0), -torch.inf))


def wrong_shape(folder):
    change_tensors(folder, lambda tensors: tensors.update({NORM: torch.ones(31)}))


def integer_weights(folder):
    change_tensors(
        folder, lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int32)})
    )


def pickle_only(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def unknown_architecture(folder):
    change_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])


def already_converted(folder):
    write_tiny_checkpoint(folder, tiny_config("kimi_linear"))


def contradicting_config(folder):
    change_config(folder, num_experts_per_tok=99)


def quantised(folder):
    change_config(folder, quantization_config={"quant_method": "awq"})


def missing_shard(folder):
    (folder / FIRST).unlink()


def missing_index(folder):
    (folder / INDEX).unlink()


def missing_config(folder):
    (folder / "config.json").unlink()


def empty_folder(folder):
    for path in folder.iterdir():
        path.unlink()


def config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    """Rewrite the folder's weights as one file, with one change."""
    tensors = {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    change(tensors)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Each with words of the error that it must give, message or found.
BROKEN_SOURCES = {
    truncated_shard: "cut off",
    overlapping_tensors: "overlap",
    lfs_pointer: "Git LFS pointer",
    index_outside_the_folder: "../secret.safetensors",
    missing_tensor: "1 missing: 'model.norm.weight'",
    extra_tensor: "1 unknown: 'surprise'",
    nan_weight: "'model.norm.weight' holds values that are not finite",
    nan_in_a_mixer: "'model.layers.1.self_attn.kv_b_proj.weight' holds values that are not finite",
    infinite_expert: "'model.layers.2.mlp.experts.3.up_proj.weight' holds values",
    wrong_shape: "'model.norm.weight' has the wrong shape",
    integer_weights: "I32",
    pickle_only: "pickle",
    unknown_architecture: "'llama'",
    already_converted: "cannot be converted",
    contradicting_config: "num_experts_per_tok",
    quantised: "quantised",
    missing_shard: FIRST,
    missing_index: f"no {INDEX}",
    missing_config: "config.json is missing",
    empty_folder: "config.json is missing",
    config_that_is_not_json: "not readable JSON",
}
