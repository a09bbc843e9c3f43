"""What a calibration will take, told before it starts."""

from __future__ import annotations

from dataclasses import replace

import torch

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.config.calibration import DistilledParameters
from kimi_convert.config.huggingface import read_config
from kimi_convert.config.recipe import default_recipe, with_training
from kimi_convert.conversion.calibration import cost
from kimi_convert.conversion.calibration.cost import calibration_cost
from kimi_convert.conversion.calibration.streams import batches
from kimi_convert.model.recall import probes_of


def cost_of(distill_tokens, device="cpu", parameters=DistilledParameters.MIXERS):
    recipe = with_training(default_recipe(), align_steps=0, distill_tokens=distill_tokens)
    assert recipe.calibration is not None
    chosen = replace(recipe.calibration.distill, parameters=parameters)
    calibration = replace(recipe.calibration, distill=chosen)
    return calibration_cost(read_config(example_checkpoint()), calibration, device)


def test_a_large_vocabulary_is_taken_a_sequence_at_a_time():
    rows = [run.stop - run.start for run in batches(20, values_per_row=512 * 4096)]
    assert rows == [8, 8, 4]
    assert {run.stop - run.start for run in batches(20, values_per_row=512 * 163_840)} == {1}


def test_distillation_is_counted_by_its_tokens():
    none, some, more = (cost_of(tokens) for tokens in (0, 2**20, 2**22))
    assert (more.flops - none.flops) / (some.flops - none.flops) == 4
    # 7 million parameters that a token meets in part, five times, two products each.
    assert 20e6 < (some.flops - none.flops) / 2**20 < 100e6


def test_training_of_all_holds_all_of_it_six_times_more():
    stored = sum(path.stat().st_size for path in example_checkpoint().glob("*.safetensors"))
    mixers, everything = cost_of(2**20), cost_of(2**20, parameters=DistilledParameters.ALL)
    more = everything.memory_bytes - mixers.memory_bytes
    assert 4 * 2 * stored < more < 6 * 2 * stored  # fp32; mixers are in both
    assert everything.flops > mixers.flops


def test_distillation_holds_the_whole_model_and_its_training():
    stored = sum(path.stat().st_size for path in example_checkpoint().glob("*.safetensors"))
    assert cost_of(2**20).memory_bytes > 2 * stored  # fp32
    assert cost_of(2**20).memory_bytes > cost_of(2**20, "cuda").memory_bytes > stored


def test_tokens_of_the_probes_are_counted():
    config = read_config(example_checkpoint())
    drawn = probes_of(torch.arange(config.vocab_size), config, seed=0)
    assert sum(one.probe.inputs.numel() for one in drawn) == cost.PROBED
