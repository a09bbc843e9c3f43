"""Through our models and back: the same bytes under the same names."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.config.huggingface import config_to_json, read_config
from kimi_convert.exporters.safetensors import export_safetensors
from kimi_convert.model.loading import load_model
from kimi_convert.model.names.layout import expected_entries
from tests.oracles.comparison import load_theirs
from tests.oracles.test_kimi_linear import randomised_native_model
from tests.parity.models import MODELS, model
from tests.tiny import tiny_config, write_tiny_checkpoint


def stored(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def parameters(folder, dtype):
    """Return what our model holds, by the names of its naming table: experts one by one."""
    held = {}
    for name, value in load_model(folder, dtype=dtype).state_dict().items():
        before, stacked, leaf = name.partition(".moe.experts.")
        if not stacked:
            held[name] = value
            continue
        for expert, part in enumerate(value):
            held[f"{before}.moe.experts.{expert}.{leaf}.weight"] = part
    return held


def through_our_model(folder, output):
    """Load a checkpoint into a model, and write what the model holds as a checkpoint."""
    config = read_config(folder)
    before = stored(folder)
    held = parameters(folder, getattr(torch, config.dtype))
    names = {entry.param: entry.name for entry in expected_entries(config)}
    written = {names[param]: held[param] for param in names}
    output.mkdir()
    dtypes = {name: tensor.dtype for name, tensor in before.items()}
    tensors = {name: t.to(dtypes.get(name, t.dtype)).contiguous() for name, t in written.items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(config_to_json(config)))
    return output


def assert_same_bytes(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        same = torch.equal(
            tensor.flatten().view(torch.uint8), other[name].flatten().view(torch.uint8)
        )
        assert same, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_is_the_same_after_our_model(name, dtype, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "source", model(name, dtype=dtype), seed=8)
    assert_same_bytes(stored(folder), stored(through_our_model(folder, tmp_path / "again")))


def test_example_is_the_same_after_our_model(tmp_path):
    source = example_checkpoint()
    assert_same_bytes(stored(source), stored(through_our_model(source, tmp_path / "again")))


@pytest.mark.parametrize("name", MODELS)
def test_wider_files_and_back_are_the_same_bytes(name, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "source", model(name, dtype="bfloat16"), seed=8)
    export_safetensors(folder, tmp_path / "wide", dtype="float32")
    export_safetensors(tmp_path / "wide", tmp_path / "again", dtype="bfloat16")
    before, after = stored(folder), stored(tmp_path / "again")
    # The router's bias is never narrowed: it comes back wide, with the same values.
    biases = {n for n in after if n.endswith("e_score_correction_bias")}
    for bias in biases:
        assert torch.equal(before.pop(bias).float(), after.pop(bias))
    assert_same_bytes(before, after)


def test_checkpoint_written_by_transformers_comes_back_as_it_was(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = randomised_native_model(q_lora_rank=None)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = through_our_model(tmp_path / "theirs", tmp_path / "ours")
    # They write the feed-forward of a dense layer under the name of a sparse one: an alias here.
    renamed = {
        name.replace("block_sparse_moe.", "mlp.") if is_dense(name) else name: tensor
        for name, tensor in stored(tmp_path / "theirs").items()
    }
    assert_same_bytes(renamed, stored(ours))
    again = load_theirs(transformers.KimiLinearForCausalLM, ours)
    again.save_pretrained(tmp_path / "again")
    assert_same_bytes(stored(tmp_path / "theirs"), stored(tmp_path / "again"))


def is_dense(name):
    return name.startswith("model.layers.0.block_sparse_moe.")


@pytest.mark.parametrize("name", MODELS)
def test_names_are_bijective(name):
    entries = expected_entries(model(name))
    assert len({entry.param for entry in entries}) == len(entries)
    assert len({entry.name for entry in entries}) == len(entries)


def test_a_tensor_under_another_name_is_not_the_same_checkpoint(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "source", tiny_config("kimi_linear"), seed=8)
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = stored(other)
    one, two = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    with pytest.raises(AssertionError, match="q_proj"):
        assert_same_bytes(stored(folder), tensors)
