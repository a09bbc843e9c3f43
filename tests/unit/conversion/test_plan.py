"""Plans against what conversions then do: sizes to the byte, dtypes, memory; and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_convert.checkpoints import background, streaming
from kimi_convert.config.recipe import Recipe, default_recipe
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.conversion.plan import plan_conversion
from kimi_convert.conversion.rules import Op
from kimi_convert.errors import CheckpointError
from tests.integration.broken import change_tensors
from tests.tiny import tiny_config, write_tiny_checkpoint

SHAPES = {
    "v3": ("deepseek_v3", {}),
    "v3-bf16-q_lora": ("deepseek_v3", {"dtype": "bfloat16", "q_lora_rank": 20}),
    "v3-fp16-tied": ("deepseek_v3", {"dtype": "float16", "tie_word_embeddings": True}),
    "v2-softmax": ("deepseek_v2", {"dtype": "bfloat16", "n_shared_experts": 2}),
}


@pytest.fixture
def source(tmp_path):
    return write_tiny_checkpoint(tmp_path / "source", tiny_config("deepseek_v3", dtype="bfloat16"))


@pytest.mark.parametrize("max_shard_bytes", [20_000, 150_000, 5 * 10**9])
@pytest.mark.parametrize("name", SHAPES)
def test_files_are_as_planned_to_the_byte(name, max_shard_bytes, tmp_path):
    kind, fields = SHAPES[name]
    source = write_tiny_checkpoint(tmp_path / "in", tiny_config(kind, **fields))
    plan = plan_conversion(source, Recipe(), max_shard_bytes=max_shard_bytes)
    convert_checkpoint(source, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert {file["name"]: file["size"] for file in plan.to_json()["files"]} == written
    assert plan.write_bytes == sum(written.values())
    assert (len(written) == 1) == (max_shard_bytes > 10**6)
    found = {}
    for file_name in written:
        with safe_open(tmp_path / "out" / file_name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                part = file.get_slice(key)
                found[key] = (part.get_dtype(), tuple(part.get_shape()))
    assert found == {
        task.tensor.name: (task.tensor.dtype, task.tensor.shape) for task in plan.tasks
    }


def test_default_is_what_convert_does_by_default(source):
    assert plan_conversion(source).to_json() == plan_conversion(source, default_recipe()).to_json()


def test_bytes_read_and_copied_are_counted_once(source):
    plan = plan_conversion(source, Recipe())
    assert plan.read_bytes == plan.index.nbytes
    copied = {task.sources[0] for task in plan.tasks if task.op is Op.COPY}
    assert plan.copied_bytes == sum(plan.index.spec(name).nbytes for name in copied)
    assert 0 < plan.copied_bytes < plan.read_bytes


def test_tensors_are_in_the_order_in_which_a_model_runs(source):
    tasks = plan_conversion(source, Recipe()).tasks
    assert tasks[0].tensor.name == "model.embed_tokens.weight"
    assert [task.tensor.name for task in tasks[-2:]] == ["model.norm.weight", "lm_head.weight"]
    layers = [task.layer_idx for task in tasks[1:-2]]
    assert layers == sorted(layers)


def test_everything_but_decay_has_the_dtype_of_its_source(source):
    dtypes = defaultdict(set)
    for task in plan_conversion(source, Recipe()).tasks:
        dtypes[task.tensor.dtype].add(task.tensor.name.rpartition(".self_attn.")[2])
    assert dtypes.keys() == {"BF16", "F32"}
    assert dtypes["F32"] == {"A_log", "dt_bias"}


@pytest.mark.parametrize(
    ("widened", "follow"),
    [
        (
            "kv_b_proj.weight",
            {"k_proj.weight", "v_proj.weight", "k_conv1d.weight", "v_conv1d.weight"},
        ),
        ("q_proj.weight", {"q_proj.weight", "q_conv1d.weight"}),
        (
            "o_proj.weight",  # beside it lies what is made from no source
            {
                *("o_proj.weight", "o_norm.weight", "b_proj.weight", "f_a_proj.weight"),
                *("f_b_proj.weight", "g_a_proj.weight", "g_b_proj.weight"),
            },
        ),
        ("kv_a_proj_with_mqa.weight", set()),
    ],
)
def test_what_is_made_from_a_wider_tensor_is_as_wide(widened, follow, source):
    prefix = "model.layers.1.self_attn."

    def widen(tensors):
        tensors[prefix + widened] = tensors[prefix + widened].float()

    change_tensors(source, widen)
    wide = {
        task.tensor.name.removeprefix(prefix)
        for task in plan_conversion(source, Recipe()).tasks
        if task.tensor.dtype == "F32" and task.layer_idx == 1
    }
    assert wide == follow | {"A_log", "dt_bias"}


def test_correction_bias_keeps_its_own_dtype(source):
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    change_tensors(source, lambda tensors: tensors.update({name: tensors[name].float()}))
    tasks = {task.sources: task for task in plan_conversion(source, Recipe()).tasks}
    assert tasks[(name,)].tensor.dtype == "F32"


def test_document_is_json_and_says_what_is_lost(tmp_path):
    config = tiny_config("deepseek_v3", num_nextn_predict_layers=1, q_lora_rank=20)
    source = write_tiny_checkpoint(tmp_path, config)
    change_tensors(source, lambda t: t.update({"model.layers.4.enorm.weight": torch.ones(32)}))
    plan = plan_conversion(source, Recipe(keep_layers=(1,)))
    document = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert document["source"] == str(source)
    assert (document["kda_layers"], document["mla_layers"]) == ([0, 2, 3], [1])
    assert document["recipe"]["keep_layers"] == [1]
    assert [one["name"] for one in document["dropped"]] == ["model.layers.4.enorm.weight"]
    assert len(document["tensors"]) == len(plan.tasks)
    loads = {one["runtime"]: one["loads"] for one in document["runtimes"]}
    assert loads["llama.cpp"]
    assert not loads["vLLM"]


def test_same_folder_gives_the_same_plan(source):
    assert plan_conversion(source).to_json() == plan_conversion(str(source)).to_json()


def test_planning_takes_no_torch_and_reads_no_weights(source):
    for path in source.glob("*.safetensors"):  # holes where the weights were
        data = path.read_bytes()
        header_bytes = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:header_bytes])
        with path.open("r+b") as file:
            file.truncate(len(data))
    code = (
        "import json, sys; from kimi_convert.conversion import plan_conversion\n"
        f"json.dumps(plan_conversion({str(source)!r}).to_json())\n"
        "assert not {'torch', 'numpy', 'safetensors.torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_checkpoint_that_is_not_whole_is_refused(source):
    change_tensors(source, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="1 missing"):
        plan_conversion(source)


# Memory: every storage that torch makes during a conversion, seen as it comes and goes.


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages made within it that are still held."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.peak = 0

    @property
    def now(self):
        return sum(self.sizes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self._watch(one.untyped_storage())
        return made

    def _watch(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key, None)
            self.peak = max(self.peak, self.now)


SMALL = 4096  # half-lives are computed in fp64, scalars are scalars: a few hundred bytes


@pytest.mark.parametrize(
    ("dtype", "q_lora_rank"),
    [("bfloat16", None), ("bfloat16", 96), ("float32", 96)],
    ids=["bf16", "bf16-q_lora", "fp32-q_lora"],
)
def test_each_tensor_is_made_within_its_planned_bytes_and_then_freed(
    dtype, q_lora_rank, tmp_path, monkeypatch
):
    # On this thread, where bytes are counted; hashed at once, not a little later.
    monkeypatch.setattr(streaming, "ahead", lambda pieces, **_: pieces)
    monkeypatch.setattr(background, "_THREADED_BYTES", 10**9)
    config = tiny_config(
        "deepseek_v3",
        dtype=dtype,
        hidden_size=192,
        num_hidden_layers=2,
        kv_lora_rank=64,
        q_lora_rank=q_lora_rank,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=4,
    )
    source = write_tiny_checkpoint(tmp_path / "in", config)
    plan = plan_conversion(source, Recipe())
    held, peaks, live = {}, {}, LiveBytes()

    def between_tensors(event):
        held[event.detail] = live.now
        peaks[event.detail], live.peak = live.peak, live.now

    with live:
        convert_checkpoint(source, tmp_path / "out", on_progress=between_tensors)
    assert set(held.values()) == {0}
    # An event comes before its tensor: the peak it resets is that of the tensor before it.
    names = [*peaks][1:]
    shares = []
    for task, following in zip(plan.tasks, names, strict=True):
        planned = replace(plan, tasks=(task,)).peak_memory_bytes
        assert planned <= plan.peak_memory_bytes
        if task.op is Op.COPY:
            assert peaks[following] <= SMALL, task
        else:
            assert peaks[following] <= max(planned, SMALL), task
            shares.append(peaks[following] / planned)
    # Nor is it a bound that anything would keep.
    assert min(shares) > 0.25
