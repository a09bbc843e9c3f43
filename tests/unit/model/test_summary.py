"""What `inspect` says: counts against the tensors themselves, problems instead of refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time

import pytest

from kimi_convert.checkpoints.index import CheckpointIndex, ShardFile
from kimi_convert.checkpoints.safetensors_header import TensorSpec
from kimi_convert.errors import CheckpointError, ConfigError
from kimi_convert.model import summary as module
from kimi_convert.model.names.layout import expected_entries
from kimi_convert.model.summary import summarize_checkpoint
from tests.integration.command_line import environment
from tests.tiny import random_tensors, tiny_config, write_tiny_checkpoint

KINDS = ["deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_linear"]


@pytest.fixture(params=KINDS)
def config(request):
    return tiny_config(request.param)


def test_counts_are_those_of_the_tensors(tmp_path, config):
    found = summarize_checkpoint(write_tiny_checkpoint(tmp_path, config))
    tensors = random_tensors(config)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert sum(row.nbytes for row in found.dtypes) == sum(t.nbytes for t in tensors.values())
    assert sum(row.tensors for row in found.dtypes) == len(tensors)
    assert sum(shard.tensors for shard in found.shards) == len(tensors)
    assert found.file_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert found.problems == ()
    assert found.dropped == ()


def test_layers_sum_to_all_but_embedding_head_and_final_norm(tmp_path, config):
    found = summarize_checkpoint(write_tiny_checkpoint(tmp_path, config))
    outside = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    assert sum(layer.parameters for layer in found.layers) == found.parameters - outside


def test_layer_kinds_follow_the_config(tmp_path):
    config = tiny_config("kimi_linear")
    found = summarize_checkpoint(write_tiny_checkpoint(tmp_path, config))
    assert [(layer.mixer, layer.feed_forward) for layer in found.layers] == [
        ("kda", "dense"),
        ("kda", "moe"),
        ("kda", "moe"),
        ("mla", "moe"),
    ]


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_use(tmp_path):
    config = tiny_config("deepseek_v3")
    found = summarize_checkpoint(write_tiny_checkpoint(tmp_path, config))
    one_expert = 3 * config.hidden_size * config.moe.intermediate_size
    unused = len(config.moe_layers) * (8 - 3) * one_expert
    assert found.active_parameters == found.parameters - unused


def test_document_is_json_and_layers_count_from_0(tmp_path, config):
    document = summarize_checkpoint(write_tiny_checkpoint(tmp_path, config)).to_json()
    read = json.loads(json.dumps(document))
    assert [layer["layer_idx"] for layer in read["layers"]] == [0, 1, 2, 3]
    assert read["config"]["hidden_size"] == config.hidden_size


def test_missing_tensor_is_a_problem_and_not_a_refusal(tmp_path):
    config = tiny_config("deepseek_v3")
    folder = write_tiny_checkpoint(tmp_path, config)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"num_hidden_layers": 5}))
    found = summarize_checkpoint(folder)
    (problem,) = found.problems
    assert "missing" in problem.found
    assert len(found.layers) == 5
    assert len(found.shards) == 2


def test_broken_index_still_shows_what_config_json_says(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, tiny_config("deepseek_v3"))
    (folder / "model.safetensors.index.json").write_text("{}")
    found = summarize_checkpoint(folder)
    assert [type(problem) for problem in found.problems] == [CheckpointError]
    assert found.parameters > 0
    assert found.shards == ()
    assert found.to_json()["problems"][0]["message"] == found.problems[0].message


def test_dropped_tensors_have_a_reason(tmp_path):
    config = tiny_config("deepseek_v3", num_nextn_predict_layers=1)
    folder = write_tiny_checkpoint(tmp_path, config, num_shards=1)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.enorm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (dropped,) = summarize_checkpoint(folder).dropped
    assert dropped.name == "model.layers.4.enorm.weight"
    assert "multi-token" in dropped.why


def test_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        summarize_checkpoint(tmp_path / "nowhere")


def test_unknown_architecture_is_refused(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, tiny_config("deepseek_v3"))
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"model_type": "llama"}))
    with pytest.raises(ConfigError, match="model_type"):
        summarize_checkpoint(folder)


def test_every_tensor_of_every_architecture_belongs_to_a_part(config):
    for entry in expected_entries(config):
        assert module._part(entry.template)


def test_a_hundred_thousand_tensors_take_seconds(tmp_path, monkeypatch):
    """Names and shapes of a checkpoint larger than any released one, at the true number."""
    config = tiny_config(
        "kimi_k2", num_hidden_layers=121, n_routed_experts=384, num_experts_per_tok=8
    )
    entries = expected_entries(config)
    tensors = {}
    for at, entry in enumerate(entries):
        nbytes = 4 * math.prod(entry.shape)
        tensors[entry.name] = TensorSpec(entry.name, "F32", entry.shape, f"{at % 64}", 0, nbytes)
    shards = {f"{at}": ShardFile(tmp_path / f"{at}", 1, 0, 0) for at in range(64)}
    folder = write_tiny_checkpoint(tmp_path, tiny_config("kimi_k2"))
    monkeypatch.setattr(module, "read_config", lambda folder: config)
    monkeypatch.setattr(
        module, "open_index", lambda folder: CheckpointIndex(folder, tensors, shards)
    )
    assert len(tensors) > 138_000
    started = time.process_time()
    found = summarize_checkpoint(folder)
    assert found.problems == ()
    assert time.process_time() - started < 10


def test_summary_does_not_import_torch(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, tiny_config("kimi_linear"))
    code = (
        "import sys; from pathlib import Path; import kimi_convert\n"
        f"kimi_convert.inspect_checkpoint(Path({str(folder)!r})).to_json()\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
