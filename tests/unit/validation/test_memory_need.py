"""What a validation holds in memory, what it puts on disk instead, and when it does not begin."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from kimi_convert.errors import ResourceError
from kimi_convert.model.loading import open_layers
from kimi_convert.validation import memory_need as module
from kimi_convert.validation import text_streams
from kimi_convert.validation.activations import Activations
from kimi_convert.validation.memory_need import largest_part_bytes, memory_need, require_room
from kimi_convert.validation.options import Check, ValidationOptions
from tests.integration.command_line import run_here
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.validation.build import HYBRID, TEACHER, write_hybrid, write_token_ids

CONFIG = tiny_config("kimi_linear", vocab_size=40)
OPTIONS = ValidationOptions()
ROW = HYBRID.hidden_size * 4  # bytes of a token in fp32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("e") / "c", CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_layer_is_the_size_of_what_is_loaded(checkpoint, dtype):
    with open_layers(checkpoint, dtype=dtype) as layers:
        sizes = [
            sum(parameter.nbytes for parameter in layers.layer(layer_idx).parameters())
            for layer_idx in range(CONFIG.num_layers)
        ]
    router = 8 * (32 + 1) * 2  # bytes: weight and bias are held in fp32 there too
    found = largest_part_bytes(CONFIG, dtype)
    assert found <= max(sizes) <= found + (router if dtype is torch.bfloat16 else 0)


def test_teacher_is_held_beside_its_student():
    alone = memory_need([HYBRID], OPTIONS, text_tokens=1000)
    both = memory_need([HYBRID, TEACHER], OPTIONS, text_tokens=1000)
    assert both.layer_bytes > alone.layer_bytes
    assert (alone.carried_bytes, both.carried_bytes) == (1000 * ROW, 3 * 1000 * ROW)
    # A stream of the teacher for every layer that is replaced.
    without = replace(OPTIONS, checks=OPTIONS.checks - {Check.REPLACEMENT})
    fewer = memory_need([HYBRID, TEACHER], without, text_tokens=1000).inside_bytes
    assert both.inside_bytes - fewer == HYBRID.num_layers * 2048 * ROW


def test_activations_go_to_disk_where_memory_is_too_small_for_them(monkeypatch):
    need = memory_need([HYBRID], OPTIONS, text_tokens=1000)
    for free, on_disk in (
        (need.memory_bytes, False),
        (need.memory_bytes - 1, True),
        (None, False),
    ):
        monkeypatch.setattr(module, "free_memory_bytes", lambda free=free: free)
        found = memory_need([HYBRID], OPTIONS, text_tokens=1000)
        assert found.on_disk is on_disk
        assert found.memory_bytes + found.disk_bytes == need.memory_bytes
    assert not memory_need([HYBRID], OPTIONS, text_tokens=0).on_disk


def test_a_layer_that_does_not_fit_is_refused_before_it_is_read(checkpoint, monkeypatch):
    found = memory_need([CONFIG], OPTIONS, text_tokens=0)
    require_room(found, where=checkpoint)
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 10**6)
    with pytest.raises(ResourceError, match="one layer"):
        require_room(found, where=checkpoint)
    assert run_here("validate", checkpoint).returncode == 5


def test_memory_of_a_gpu_is_what_counts_where_layers_run_there(checkpoint, monkeypatch):
    found = replace(memory_need([CONFIG], OPTIONS, text_tokens=0), device="cuda:1")
    for free, fits in ((found.layer_bytes, True), (found.layer_bytes - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at, free=free: (free, 0))
        with nullcontext() if fits else pytest.raises(ResourceError, match="one layer"):
            require_room(found, where=checkpoint)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A call whose layers fit into memory, and whose 128 tokens do not."""
    folder = write_hybrid(tmp_path / "c")
    text = write_token_ids(tmp_path / "text.jsonl", rows={"a": 8})
    need = memory_need([HYBRID], OPTIONS, text_tokens=128)
    monkeypatch.setattr(module, "free_memory_bytes", lambda: need.fixed_bytes)
    return ("validate", folder, "--text", text, "--sequence-length", 16)


def test_disk_that_is_too_small_is_refused_with_numbers_before_anything_runs(call, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda folder: 1000)
    done = run_here(*call)
    assert done.returncode == 5
    assert "nor room on the disk" in done.stderr
    assert "16384 bytes" in done.stderr.replace(",", "")  # 128 tokens x 32 x 4
    assert "TMPDIR" in done.stderr


def test_a_small_machine_measures_with_files_and_says_so_first(call, monkeypatch):
    made = []
    monkeypatch.setattr(
        text_streams, "Activations", lambda *a, on_disk, **k: made.append(on_disk) or new(*a, **k)
    )
    new = partial(Activations, on_disk=True)
    done = run_here(*call)
    assert done.returncode == 0, done.stdout
    assert "16.4 kB on disk" in done.stderr
    assert made == [True]
