from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from kimi_convert.commands.validate import estimate_text
from kimi_convert.errors import ResourceError
from kimi_convert.model.loading import open_layers
from kimi_convert.validation.estimate import (
    active_parameters,
    estimate_validation,
    largest_part_bytes,
    require_memory,
)
from kimi_convert.validation.options import Check, ValidationOptions
from tests.integration.command_line import run_here
from tests.tiny import tiny_config, write_tiny_checkpoint

CONFIG = tiny_config("kimi_linear", vocab_size=40)
OPTIONS = ValidationOptions()


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


def test_a_token_meets_its_experts_alone():
    dense = tiny_config("kimi_linear", first_k_dense_replace=4)
    assert active_parameters(CONFIG) != active_parameters(dense)
    assert CONFIG.moe is not None
    every = replace(CONFIG.moe, num_experts_per_token=8)
    more = active_parameters(replace(CONFIG, moe=every)) - active_parameters(CONFIG)
    assert more == 3 * (5 * 3 * 24 * 32)  # layers x experts not chosen x weights of one


def test_what_is_read_follows_the_checks(checkpoint):
    nbytes = estimate_validation(checkpoint, options=OPTIONS).read_bytes // 2
    for checks, has_text, passes in (
        (set(), False, 0),
        ({Check.VALUES}, False, 1),
        ({Check.CONSISTENCY, Check.QUALITY}, False, 1),
        (set(Check), True, 3),
    ):
        options = replace(OPTIONS, checks=frozenset(checks))
        found = estimate_validation(checkpoint, has_text=has_text, options=options)
        assert (found.passes, found.read_bytes) == (passes, passes * nbytes)
        assert found.seconds >= 0


def test_teacher_is_loaded_beside_its_student(checkpoint, tmp_path):
    teacher = write_tiny_checkpoint(tmp_path / "t", tiny_config("deepseek_v3", vocab_size=40))
    alone = estimate_validation(checkpoint, has_text=True, options=OPTIONS)
    both = estimate_validation(checkpoint, teacher=teacher, has_text=True, options=OPTIONS)
    assert both.layer_bytes > alone.layer_bytes
    assert both.memory_bytes > both.layer_bytes + both.activation_bytes


def test_a_layer_that_does_not_fit_is_refused_before_it_is_read(checkpoint, monkeypatch):
    found = estimate_validation(checkpoint, options=OPTIONS)
    require_memory(found, where=checkpoint)
    monkeypatch.setattr("kimi_convert.validation.estimate.free_memory_bytes", lambda: 10**6)
    with pytest.raises(ResourceError, match="one layer"):
        require_memory(found, where=checkpoint)
    assert run_here("validate", checkpoint).returncode == 5


def test_memory_of_a_gpu_is_what_counts_where_layers_run_there(checkpoint, monkeypatch):
    found = replace(estimate_validation(checkpoint, options=OPTIONS), device="cuda:1")
    for free, fits in ((found.layer_bytes, True), (found.layer_bytes - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at, free=free: (free, 0))
        with nullcontext() if fits else pytest.raises(ResourceError, match="one layer"):
            require_memory(found, where=checkpoint)
    assert estimate_text(found).startswith("Estimate: ")
    assert "of memory on cuda:1" in estimate_text(found)


def test_estimate_is_printed_first(checkpoint):
    done = run_here("validate", checkpoint, "--json")
    assert done.stderr.startswith("Estimate: ")
    assert run_here("validate", checkpoint, "--quiet").stderr == ""
