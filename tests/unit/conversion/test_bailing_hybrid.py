"""Hybrids in Ling-3's format: what stays is the teacher's, what is new means the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kimi_convert.config.huggingface import config_to_json, parse_config
from kimi_convert.config.output_format import MtpLayers, OutputFormat, TargetDtype
from kimi_convert.config.recipe import Recipe, load_recipe
from kimi_convert.config.target_format import TargetFormat, output_format
from kimi_convert.conversion import engine
from kimi_convert.conversion.plan import plan_conversion
from kimi_convert.conversion.rules import LING_RULES, Op
from kimi_convert.conversion.target import target_config
from kimi_convert.errors import ConfigError, RecipeError
from kimi_convert.model.loading import load_model, open_layers
from kimi_convert.model.names import bailing_hybrid, deepseek
from tests.integration.command_line import run_here
from tests.tiny import tiny_config, write_tiny_checkpoint

LING = Recipe(output_format=TargetFormat.BAILING_HYBRID)


def both_formats(tmp_path, **fields):
    teacher = write_tiny_checkpoint(tmp_path / "teacher", tiny_config("deepseek_v3", **fields))
    for name, recipe in (("kimi", Recipe()), ("ling", LING)):
        engine.convert_checkpoint(teacher, tmp_path / name, recipe=recipe)
    return teacher, tmp_path / "kimi", tmp_path / "ling"


def layer_of(folder, layer_idx):
    with open_layers(folder) as layers:
        return layers.layer(layer_idx)


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": 20}], ids=["full-q", "low-rank-q"])
def test_layer_that_stays_computes_what_it_computed(tmp_path, fields):
    teacher, _, ling = both_formats(tmp_path, **fields)
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (layer_of(folder, 3).mla(x) for folder in (teacher, ling))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_new_layer_computes_what_it_does_in_the_other_format(tmp_path):
    _, kimi, ling = both_formats(tmp_path)
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (layer_of(folder, 0).kda(x) for folder in (kimi, ling))
    # The output norm's eps is 1e-5 in both; decays agree to the rounding of their parameters.
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_weights_of_layers_that_stay_are_copied_bit_for_bit(tmp_path):
    teacher = write_tiny_checkpoint(tmp_path, tiny_config("deepseek_v3"))
    plan = plan_conversion(teacher, LING)
    ops = {task.param: task.op for task in plan.tasks if task.param.startswith("layers.3.mla.")}
    made = {name.removeprefix("layers.3.mla."): op for name, op in ops.items()}
    assert made == {
        "q.weight": Op.COPY,
        "kv_a.weight": Op.COPY,
        "kv_a_norm.weight": Op.COPY,
        "kv_b.weight": Op.COPY,
        "gate.weight": Op.ZEROS,
        "o.weight": Op.DOUBLE,
    }


def test_rules_speak_of_known_parameters_alone():
    assert {rule.target for rule in LING_RULES} == {row.param for row in bailing_hybrid.NAMES}
    known = {row.param for row in deepseek.NAMES}
    assert {source for rule in LING_RULES for source in rule.sources} == known
    assert len({(rule.target, rule.where) for rule in LING_RULES}) == len(LING_RULES)


def test_hybrid_survives_its_own_config_json():
    target = target_config(tiny_config("deepseek_v3", num_hidden_layers=9), LING)
    assert target.mla.gated
    assert target.mla.rope is not None
    assert target.kda.lower_bound == -5
    read = parse_config(config_to_json(target))
    assert replace(read, carried={}) == target


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("deepseek_v3", {"rope_interleave": False}, "neighbouring dims"),
        ("deepseek_v2", {}, "routing by sigmoid"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "experts in every layer"),
    ],
    ids=["half-split", "softmax", "frequency"],
)
def test_teacher_that_the_format_cannot_hold_is_refused(kind, fields, expected):
    with pytest.raises(ConfigError, match="bailing_hybrid format cannot hold") as caught:
        target_config(tiny_config(kind, **fields), LING)
    assert expected in caught.value.expected


def test_low_rank_query_is_loaded_by_no_runtime_that_was_examined(tmp_path):
    folder = write_tiny_checkpoint(tmp_path, tiny_config("deepseek_v3", q_lora_rank=20))
    (support, *_) = plan_conversion(folder, LING).runtimes
    assert not support.loads
    assert "full-rank q" in support.reasons[0]


def test_config_that_leaves_its_layers_open_is_refused():
    document = config_to_json(tiny_config("bailing_hybrid", num_hidden_layers=8))
    del document["layer_types"]
    assert parse_config(document).kda_layers == (0, 1, 2, 4, 5, 6)
    with pytest.raises(ConfigError, match="which layers are KDA"):
        parse_config({**document, "num_hidden_layers": 5})


@pytest.mark.parametrize("bound", [0, 1.5, -1000])
def test_bound_that_lets_nothing_fade_is_refused(bound):
    document = config_to_json(tiny_config("bailing_hybrid"))
    with pytest.raises(ConfigError, match="kda_lower_bound"):
        parse_config({**document, "kda_lower_bound": bound})


def test_older_models_of_this_type_are_refused():
    document = config_to_json(tiny_config("bailing_hybrid"))
    with pytest.raises(ConfigError, match="kda_safe_gate"):
        parse_config({**document, "kda_safe_gate": False})


def test_recipe_names_the_format(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[output]\nformat = "bailing_hybrid"\n')
    assert load_recipe(path).output_format is TargetFormat.BAILING_HYBRID
    path.write_text('[output]\nformat = "gguf"\n')
    with pytest.raises(RecipeError, match=r"output\.format"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"output\.format"):
        output_format("")


def test_whole_hybrid_runs(tmp_path):
    _, _, ling = both_formats(tmp_path)
    with torch.no_grad():
        logits = load_model(ling)(torch.randint(96, (1, 20)))
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "stored", [OutputFormat(dtype=TargetDtype.FP8), OutputFormat(mtp=MtpLayers.KEEP)]
)
def test_storage_that_has_no_names_in_this_format_is_refused(stored):
    with pytest.raises(RecipeError, match="source's dtype"):
        target_config(tiny_config("deepseek_v3"), LING, stored)


def test_commands_that_do_not_know_the_format_refuse_it(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "ling", tiny_config("bailing_hybrid"))
    for arguments in (("parity", folder), ("export", "onnx", folder, tmp_path / "onnx")):
        done = run_here(*arguments)
        assert done.returncode == 3
        assert "bailing_hybrid" in done.stderr
    assert not (tmp_path / "onnx").exists()
