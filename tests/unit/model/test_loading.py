"""From a folder to a model: every tensor in its place, once, and freed when dropped."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_convert.config.huggingface import config_to_json
from kimi_convert.errors import CheckpointError, ConfigError
from kimi_convert.model.kimi_linear import KimiLinear
from kimi_convert.model.loading import load_model, open_layers
from kimi_convert.model.mla_transformer import MlaTransformer
from kimi_convert.model.names.layout import expected_entries
from tests.tiny import random_tensors, tiny_config, write_tiny_checkpoint

CONFIGS = {
    "deepseek_v2": tiny_config("deepseek_v2", n_shared_experts=2),
    "deepseek_v3": tiny_config("deepseek_v3", q_lora_rank=20),
    "kimi_k2": tiny_config("kimi_k2", n_shared_experts=0),
    "kimi_linear": tiny_config("kimi_linear"),
    "kimi_linear-q_lora": tiny_config("kimi_linear", q_lora_rank=20),
    "kimi_linear-greedy": tiny_config("kimi_linear", topk_method="greedy"),
}
HYBRID = CONFIGS["kimi_linear"]
MAPS = Path("/proc/self/maps")
TOKENS = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CONFIGS, ids=str)
def config(request):
    return CONFIGS[request.param]


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_every_stored_tensor_is_in_the_model_bit_for_bit(config, tmp_path):
    model = load_model(write_tiny_checkpoint(tmp_path, config, seed=2))
    stored, state = random_tensors(config, seed=2), model.state_dict()
    read = set()
    for entry in expected_entries(config):
        parts = entry.param.split(".experts.")
        if len(parts) == 2:
            expert, leaf, _ = parts[1].split(".")
            key = f"{parts[0]}.experts.{leaf}"
            value = state[key][int(expert)]
        else:
            key, value = entry.param, state[entry.param]
        assert torch.equal(value, stored[entry.name]), entry.param
        read.add(key)
    assert read == set(state)


def test_model_class_follows_the_model_type(config, tmp_path):
    model = load_model(write_tiny_checkpoint(tmp_path, config))
    expected = KimiLinear if config.model_type == "kimi_linear" else MlaTransformer
    assert type(model) is expected
    assert model.config == config


def test_weights_are_frozen_and_outlive_the_files(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "model", HYBRID)
    model = load_model(folder)
    before = model(TOKENS)
    shutil.rmtree(folder)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_decay_parameters_and_router_stay_fp32_in_every_dtype(stored, dtype, tmp_path):
    config = replace(HYBRID, dtype=stored)
    model = load_model(write_tiny_checkpoint(tmp_path, config, seed=2), dtype=dtype)
    tensors = random_tensors(config, seed=2)
    precise = {"A_log", "dt_bias"}
    for name, weight in model.named_parameters():
        fp32 = name.rpartition(".")[2] in precise or ".router." in name
        assert weight.dtype is (torch.float32 if fp32 else dtype), name
    A_log = model.layers[0].kda.A_log
    assert torch.equal(A_log, tensors["model.layers.0.self_attn.A_log"])


@torch.inference_mode()
def test_layer_by_layer_run_is_the_whole_model(config, tmp_path):
    folder = write_tiny_checkpoint(tmp_path, config)
    with open_layers(folder) as layers:
        assert layers.config == config
        hidden = layers.embedding()(TOKENS)
        for layer_idx in range(layers.config.num_layers):
            hidden = layers.layer(layer_idx)(hidden)
        logits = layers.head()(hidden)
    assert torch.equal(logits, load_model(folder)(TOKENS))


def test_a_dropped_layer_is_freed(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, HYBRID)
    with open_layers(folder) as layers:
        layer = layers.layer(1)
        layer(torch.randn(1, 70, HYBRID.hidden_size))
        alive = [weakref.ref(weight) for weight in layer.parameters()]
        storage = layer.moe.experts.gate.untyped_storage()
        assert storage.nbytes() == layer.moe.experts.gate.nbytes
        del layer, storage
        gc.collect()
        assert not [one for one in alive if one() is not None]


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of mapped files")
def test_no_file_stays_mapped_between_layers(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, HYBRID)
    with open_layers(folder) as layers:
        for layer_idx in range(HYBRID.num_layers):
            layers.layer(layer_idx)
            assert str(folder) not in MAPS.read_text()


def test_tied_embeddings_are_one_parameter(tmp_path):
    config = tiny_config("deepseek_v3", tie_word_embeddings=True)
    folder = write_tiny_checkpoint(tmp_path, config)
    model = load_model(folder)
    assert model.head.weight is model.embed.weight
    with open_layers(folder) as layers:
        assert torch.equal(layers.head().weight, model.embed.weight)


def test_dense_layer_named_as_transformers_saves_it_is_read(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, HYBRID, num_shards=1)
    before = load_model(folder)(TOKENS)

    def rename(tensors):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.{leaf}.weight"
            tensors[f"model.layers.0.block_sparse_moe.{leaf}.weight"] = tensors.pop(name)

    edit_tensors(folder, rename)
    assert torch.equal(load_model(folder)(TOKENS), before)


def test_prediction_layers_and_inverse_frequencies_are_left_out(tmp_path):
    config = tiny_config("deepseek_v3")
    folder = write_tiny_checkpoint(tmp_path, config, num_shards=1)
    before = load_model(folder)(TOKENS)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.4.enorm.weight"] = torch.ones(32)

    edit_tensors(folder, add)
    edit_config(folder, num_nextn_predict_layers=1)
    assert torch.equal(load_model(folder)(TOKENS), before)


def test_quantisation_that_is_not_supported_is_refused(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, tiny_config("deepseek_v3"))
    edit_config(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(ConfigError, match="quantised") as error:
        load_model(folder)
    assert error.value.where == str(folder)
    assert error.value.hint


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop("model.layers.2.self_attn.b_proj.weight"), "b_proj"),
        (lambda t: t.update(extra=torch.ones(1)), "extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), "model.norm.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}),
            "model.norm.weight",
        ),
    ],
    ids=["missing", "extra", "wrong-shape", "wrong-dtype"],
)
def test_a_checkpoint_that_is_not_its_config_s_is_refused(edit, said, tmp_path):
    folder = write_tiny_checkpoint(tmp_path, HYBRID, num_shards=1)
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert said in str(error.value)


def test_unknown_architecture_is_refused(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, HYBRID)
    edit_config(folder, model_type="llama")
    with pytest.raises(ConfigError, match="model_type"):
        load_model(folder)


def test_config_written_by_the_tests_is_the_config(config, tmp_path):
    folder = write_tiny_checkpoint(tmp_path, config)
    assert json.loads((folder / "config.json").read_text()) == config_to_json(config)


def test_loading_makes_torch_import_nothing_more(tmp_path):
    # A random number without memory costs a second: torch imports sympy and 900 modules for it.
    folder = write_tiny_checkpoint(tmp_path, tiny_config("kimi_linear"))
    code = (
        "import sys; from kimi_convert.model.loading import load_model\n"
        f"before = len(sys.modules); load_model({str(folder)!r})\n"
        "assert len(sys.modules) - before < 10, set(sys.modules)\n"
        "assert 'sympy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
