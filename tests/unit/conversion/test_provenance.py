"""conversion.json: every tensor's origin and hash, and nothing of the machine it was made on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from safetensors import safe_open

import kimi_convert
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.conversion.provenance import CONVERSION_FILE, carried_files
from tests.integration.broken import change_tensors
from tests.tiny import tiny_config, write_tiny_checkpoint

RECIPE = Recipe(
    keep_layers=(1, 3),
    short_conv_size=3,
    qk_rms=5.0,
    v_rms=0.7,
    half_life_tokens=(0.5, 300.0),
    output_scale=0.3,
    seed=11,
)
DROPPED = "model.layers.0.self_attn.rotary_emb.inv_freq"


def make_source(folder):
    config = tiny_config("deepseek_v3", q_lora_rank=20, dtype="bfloat16")
    write_tiny_checkpoint(folder, config)
    change_tensors(folder, lambda tensors: tensors.update({DROPPED: torch.ones(4)}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def conversion(tmp_path_factory):
    root = tmp_path_factory.mktemp("provenance")
    result = convert_checkpoint(
        make_source(root / "teacher"), root / "out", recipe=RECIPE, max_shard_bytes=100_000
    )
    return root / "teacher", root / "out", result


@pytest.fixture
def document(conversion):
    return json.loads((conversion[1] / CONVERSION_FILE).read_text())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def header_of(content: bytes) -> bytes:
    return content[: 8 + int.from_bytes(content[:8], "little")]


def tensor_hashes(folder):
    """Hash every tensor's bytes through the safetensors library."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                raw = file.get_tensor(name).contiguous().view(-1).view(torch.uint8)
                found[name] = sha256(raw.numpy().tobytes())
    return found


def test_every_tensor_is_listed_with_the_hash_of_its_bytes(conversion, document):
    _, output, result = conversion
    assert {name: one["sha256"] for name, one in document["tensors"].items()} == tensor_hashes(
        output
    )
    assert {
        name: (one["op"], tuple(one["sources"])) for name, one in document["tensors"].items()
    } == {task.tensor.name: (str(task.op), task.sources) for task in result.plan.tasks}


def test_tensors_are_listed_once(conversion):
    text = (conversion[1] / CONVERSION_FILE).read_text()

    def refuse_repeats(pairs):
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    json.loads(text, object_pairs_hook=refuse_repeats)


def test_copied_tensors_have_the_hash_of_their_source(conversion, document):
    theirs = tensor_hashes(conversion[0])
    copied = {
        one["sources"][0]: one["sha256"]
        for one in document["tensors"].values()
        if one["op"] == "copy"
    }
    assert document["copied_source_sha256"] == copied
    assert copied == {name: theirs[name] for name in copied}
    assert len(copied) > 80


def test_every_other_file_is_listed_with_its_hash_and_size(conversion, document):
    contents = {
        path.name: path.read_bytes()
        for path in conversion[1].iterdir()
        if path.name != CONVERSION_FILE
    }
    assert document["files"] == {
        name: {"header_sha256": sha256(header_of(content)), "size": len(content)}
        if name.endswith(".safetensors")
        else {"sha256": sha256(content), "size": len(content)}
        for name, content in contents.items()
    }
    assert "tokenizer.json" in document["files"]


def test_source_can_be_told_from_another(conversion, document):
    source, _, result = conversion
    assert document["source"] == {
        "name": "teacher",
        "model_type": "deepseek_v3",
        "config_sha256": sha256((source / "config.json").read_bytes()),
        "tensors": len(result.plan.index.tensors),
        "nbytes": result.plan.index.nbytes,
        "files": {"model.safetensors": (source / "model.safetensors").stat().st_size},
    }


def test_dropped_tensors_are_listed_with_the_reason(document):
    (dropped,) = document["dropped"]
    assert dropped["name"] == DROPPED
    assert dropped["why"]
    assert not any(DROPPED in one["sources"] for one in document["tensors"].values())


def test_recipe_can_be_made_again_from_its_record(document):
    fields = dict(document["recipe"])
    fields["keep_layers"] = tuple(fields["keep_layers"])
    fields["half_life_tokens"] = tuple(fields["half_life_tokens"])
    assert Recipe(**fields) == RECIPE
    assert (document["layers"]["kda"], document["layers"]["mla"]) == ([0, 2], [1, 3])


def test_tool_and_runtimes_are_named(document):
    assert document["format"] == 2
    assert document["tool"] == {"name": "kimi-convert", "version": kimi_convert.__version__}
    refusing = {one["runtime"] for one in document["runtimes"] if not one["loads"]}
    assert "vLLM" in refusing
    assert all(one["reasons"] for one in document["runtimes"] if not one["loads"])


def test_every_documented_field_is_there_and_no_other(document):
    assert list(document) == [
        "format",
        "tool",
        "source",
        "recipe",
        "layers",
        "runtimes",
        "files",
        "tensors",
        "copied_source_sha256",
        "dropped",
    ]


def test_nothing_of_the_machine_is_recorded(conversion):
    source, output, _ = conversion
    text = (output / CONVERSION_FILE).read_text()
    assert str(source.parent) not in text
    assert os.uname().nodename not in text
    assert not re.search(r'"/|\d{4}-\d{2}-\d{2}', text)  # no absolute path, no date


def test_same_source_elsewhere_and_later_gives_the_same_bytes(conversion, tmp_path, monkeypatch):
    source, output, _ = conversion
    elsewhere = tmp_path / "deep" / "teacher"
    shutil.copytree(source, elsewhere)
    for path in elsewhere.iterdir():
        os.utime(path, (10**9, 10**9))
    monkeypatch.chdir(elsewhere)
    convert_checkpoint(".", tmp_path / "out", recipe=RECIPE, max_shard_bytes=100_000)
    for path in output.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_tied_embedding_is_recorded_as_the_source_of_both(tmp_path):
    config = tiny_config("deepseek_v3", tie_word_embeddings=True)
    source = write_tiny_checkpoint(tmp_path / "in", config)
    convert_checkpoint(source, tmp_path / "out")
    tensors = json.loads((tmp_path / "out" / CONVERSION_FILE).read_text())["tensors"]
    embedding = tensors["model.embed_tokens.weight"]
    assert tensors["lm_head.weight"] == embedding
    assert embedding["sources"] == ["model.embed_tokens.weight"]


def test_carried_files_are_those_that_are_there(tmp_path):
    for name in ("tokenizer.json", "generation_config.json", "NOTICE", "config.json", "run.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "LICENSE").mkdir()
    assert carried_files(tmp_path) == ("tokenizer.json", "generation_config.json", "NOTICE")
