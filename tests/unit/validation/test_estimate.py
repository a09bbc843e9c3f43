from __future__ import annotations

from dataclasses import replace

import pytest

from kimi_convert.commands.validate import estimate_text
from kimi_convert.validation.estimate import active_parameters, estimate_validation
from kimi_convert.validation.memory_need import memory_need
from kimi_convert.validation.options import Check, ValidationOptions
from tests.integration.command_line import run_here
from tests.tiny import tiny_config, write_tiny_checkpoint

CONFIG = tiny_config("kimi_linear", vocab_size=40)
OPTIONS = ValidationOptions()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("e") / "c", CONFIG)


def test_a_token_meets_its_experts_alone():
    dense = tiny_config("kimi_linear", first_k_dense_replace=4)
    assert active_parameters(CONFIG) != active_parameters(dense)
    assert CONFIG.moe is not None
    every = replace(CONFIG.moe, num_experts_per_token=8)
    more = active_parameters(replace(CONFIG, moe=every)) - active_parameters(CONFIG)
    assert more == 3 * (5 * 3 * 24 * 32)  # layers x experts not chosen x weights of one


def estimate(checkpoint, *, options=OPTIONS, text_tokens=0):
    need = memory_need([CONFIG], options, text_tokens=text_tokens)
    return estimate_validation(
        [checkpoint], [CONFIG], options, memory=need, text_tokens=text_tokens
    )


def test_what_is_read_follows_the_checks(checkpoint):
    nbytes = estimate(checkpoint).read_bytes // 2
    for checks, text_tokens, passes in (
        (set(), 0, 0),
        ({Check.VALUES}, 0, 1),
        ({Check.CONSISTENCY, Check.QUALITY}, 0, 1),
        (set(Check), 64, 3),
    ):
        options = replace(OPTIONS, checks=frozenset(checks))
        found = estimate(checkpoint, options=options, text_tokens=text_tokens)
        assert (found.passes, found.read_bytes) == (passes, passes * nbytes)
        assert found.seconds >= 0


def test_estimate_names_the_gpu_and_what_goes_to_disk(checkpoint):
    found = estimate(checkpoint)
    assert "on disk" not in estimate_text(found)
    memory = replace(found.memory, device="cuda:1", on_disk=True, carried_bytes=3 * 10**9)
    said = estimate_text(replace(found, memory=memory))
    assert "of memory on cuda:1 and 3.0 GB on disk, of which" in said


def test_estimate_is_printed_first(checkpoint):
    done = run_here("validate", checkpoint, "--json")
    assert done.stderr.startswith("Estimate: ")
    assert run_here("validate", checkpoint, "--quiet").stderr == ""
