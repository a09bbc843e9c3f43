"""The rules make every tensor of every hybrid, once, and read every tensor of its teacher."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion import tasks as tasks_module
from kimi_convert.conversion.plan import plan_conversion
from kimi_convert.conversion.rules import RULES, Op, Rule
from kimi_convert.errors import CheckpointError, MappingError
from kimi_convert.model.names import deepseek, kimi_linear
from kimi_convert.model.names.layout import expected_entries
from tests.integration.broken import change_tensors
from tests.tiny import tiny_config, write_tiny_checkpoint

CONFIGS = {
    "v3": ("deepseek_v3", {}, None),
    "v3-q_lora": ("deepseek_v3", {"q_lora_rank": 20}, None),
    "v3-no-dense-layer": ("deepseek_v3", {"first_k_dense_replace": 0}, (0, 3)),
    "v3-three-dense-layers": ("deepseek_v3", {"first_k_dense_replace": 3}, (0,)),
    "v3-all-dense": ("deepseek_v3", {"first_k_dense_replace": 4, "q_lora_rank": 20}, (2,)),
    "v3-every-other-layer-dense": ("deepseek_v3", {"moe_layer_freq": 2}, None),
    "v3-no-shared-expert": ("deepseek_v3", {"n_shared_experts": 0}, None),
    "v3-two-shared-experts": ("deepseek_v3", {"n_shared_experts": 2, "q_lora_rank": 20}, (1, 2)),
    "v3-groups": ("deepseek_v3", {"n_group": 4, "topk_group": 2}, None),
    "v3-greedy": ("deepseek_v3", {"topk_method": "greedy"}, None),
    "v3-tied": ("deepseek_v3", {"tie_word_embeddings": True}, None),
    "v3-nothing-rotates": ("deepseek_v3", {"qk_rope_head_dim": 0}, None),
    "v3-nothing-kept": ("deepseek_v3", {}, ()),
    "v3-one-converted": ("deepseek_v3", {"q_lora_rank": 20}, (0, 1, 3)),
    "v2-softmax": ("deepseek_v2", {}, None),
    "v2-softmax-with-bias": ("deepseek_v2", {"topk_method": "noaux_tc"}, (0,)),
    "v2-sigmoid-q_lora-tied": (
        "deepseek_v2",
        {"scoring_func": "sigmoid", "q_lora_rank": 20, "tie_word_embeddings": True},
        (),
    ),
    "k2-five-layers": ("kimi_k2", {"num_hidden_layers": 5, "q_lora_rank": 20}, None),
}


def plan_of(folder, config, keep=None):
    write_tiny_checkpoint(folder, config)
    return plan_conversion(folder, Recipe(keep_layers=keep))


@pytest.mark.parametrize("name", CONFIGS)
def test_rules_make_every_tensor_once_and_read_every_source(name, tmp_path):
    kind, fields, keep = CONFIGS[name]
    plan = plan_of(tmp_path, tiny_config(kind, **fields), keep)
    made = [(task.tensor.name, task.tensor.shape) for task in plan.tasks]
    assert made == [(entry.name, entry.shape) for entry in expected_entries(plan.target_config)]
    assert Counter(name for name, _ in made).most_common(1)[0][1] == 1
    assert {source for task in plan.tasks for source in task.sources} == set(plan.index.tensors)
    assert plan.dropped == ()


def test_model_without_experts_is_covered(tmp_path):
    plan = plan_of(tmp_path, replace(tiny_config("deepseek_v3"), moe=None))
    assert {source for task in plan.tasks for source in task.sources} == set(plan.index.tensors)


# Written down by hand: what one layer of each kind is made from.
MLA = "model.layers.{i}.self_attn."
NORM = "model.layers.{i}.input_layernorm.weight"
LATENT = (
    MLA + "kv_a_proj_with_mqa.weight",
    MLA + "kv_a_layernorm.weight",
    MLA + "kv_b_proj.weight",
)
LOW_RANK = (MLA + "q_a_proj.weight", MLA + "q_a_layernorm.weight", MLA + "q_b_proj.weight")
KDA_LAYER = {
    "q_proj.weight": ("take_query", (MLA + "q_proj.weight",)),
    "k_proj.weight": ("fold_key", LATENT),
    "v_proj.weight": ("fold_value", LATENT),
    "q_conv1d.weight": ("query_taps", (NORM, MLA + "q_proj.weight")),
    "k_conv1d.weight": ("key_taps", (NORM, *LATENT)),
    "v_conv1d.weight": ("value_taps", (NORM, *LATENT)),
    "A_log": ("decay_rate", ()),
    "dt_bias": ("decay_bias", ()),
    "f_a_proj.weight": ("random", ()),
    "f_b_proj.weight": ("zeros", ()),
    "b_proj.weight": ("zeros", ()),
    "g_a_proj.weight": ("random", ()),
    "g_b_proj.weight": ("zeros", ()),
    "o_norm.weight": ("output_gain", ()),
    "o_proj.weight": ("scale_output", (MLA + "o_proj.weight", NORM, *LATENT)),
}
LOW_RANK_KDA_LAYER = {
    **KDA_LAYER,
    "q_proj.weight": ("fold_query", LOW_RANK),
    "q_conv1d.weight": ("folded_query_taps", (NORM, *LOW_RANK)),
}
MLA_LAYER = {
    "q_proj.weight": ("keep_query", (MLA + "q_proj.weight",)),
    **{
        leaf + ".weight": ("copy", (MLA + leaf + ".weight",))
        for leaf in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    },
}
LOW_RANK_MLA_LAYER = {
    **{leaf: made for leaf, made in MLA_LAYER.items() if leaf != "q_proj.weight"},
    "q_a_proj.weight": ("copy", (LOW_RANK[0],)),
    "q_a_layernorm.weight": ("copy", (LOW_RANK[1],)),
    "q_b_proj.weight": ("keep_query", (LOW_RANK[2],)),
}


@pytest.mark.parametrize(
    ("q_lora_rank", "kda_layer", "mla_layer"),
    [(None, KDA_LAYER, MLA_LAYER), (20, LOW_RANK_KDA_LAYER, LOW_RANK_MLA_LAYER)],
    ids=["full-rank", "low-rank"],
)
def test_mixers_are_made_from_their_own_layer(q_lora_rank, kda_layer, mla_layer, tmp_path):
    plan = plan_of(tmp_path, tiny_config("deepseek_v3", q_lora_rank=q_lora_rank))
    for layer_idx in range(4):
        prefix = MLA.format(i=layer_idx)
        made = {
            task.tensor.name.removeprefix(prefix): (str(task.op), task.sources)
            for task in plan.tasks
            if task.tensor.name.startswith(prefix)
        }
        table = mla_layer if layer_idx == 3 else kda_layer
        assert made == {
            leaf: (op, tuple(name.format(i=layer_idx) for name in sources))
            for leaf, (op, sources) in table.items()
        }


def test_experts_are_copied_to_their_released_names(tmp_path):
    plan = plan_of(tmp_path, tiny_config("deepseek_v3"))
    tasks = {task.tensor.name: task for task in plan.tasks}
    for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        task = tasks[f"model.layers.2.block_sparse_moe.experts.5.{theirs}.weight"]
        assert task.op is Op.COPY
        assert task.sources == (f"model.layers.2.mlp.experts.5.{ours}.weight",)


@pytest.mark.parametrize(
    ("kind", "op", "num_sources"), [("deepseek_v3", Op.COPY, 1), ("deepseek_v2", Op.ZEROS, 0)]
)
def test_correction_bias_is_copied_or_zero(kind, op, num_sources, tmp_path):
    plan = plan_of(tmp_path, tiny_config(kind))
    biases = [task for task in plan.tasks if task.tensor.name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    assert {(task.op, len(task.sources)) for task in biases} == {(op, num_sources)}


def test_tied_head_is_a_copy_of_the_embedding(tmp_path):
    plan = plan_of(tmp_path, tiny_config("deepseek_v3", tie_word_embeddings=True))
    assert plan.tasks[-1].tensor.name == "lm_head.weight"
    assert (plan.tasks[-1].op, plan.tasks[-1].sources) == (Op.COPY, ("model.embed_tokens.weight",))


def test_rules_speak_of_known_parameters_alone():
    sources = {row.param for row in deepseek.NAMES}
    targets = {row.param for row in kimi_linear.NAMES}
    assert {rule.target for rule in RULES} == targets
    assert {source for rule in RULES for source in rule.sources} == sources
    assert len({(rule.target, rule.where) for rule in RULES}) == len(RULES)


def test_mtp_layers_and_frequencies_are_dropped_with_a_reason(tmp_path):
    config = tiny_config("deepseek_v3", num_nextn_predict_layers=1)
    write_tiny_checkpoint(tmp_path, config)
    extra = (
        "model.layers.4.eh_proj.weight",
        "model.layers.4.self_attn.o_proj.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    change_tensors(tmp_path, lambda tensors: tensors.update({n: torch.ones(2) for n in extra}))
    plan = plan_conversion(tmp_path)
    whys = {one.name: one.why for one in plan.dropped}
    assert whys.keys() == set(extra)
    assert "multi-token-prediction" in whys[extra[0]]
    assert "config.json" in whys[extra[2]]
    used = {source for task in plan.tasks for source in task.sources}
    assert used == set(plan.index.tensors) - set(extra)
    assert plan.read_bytes == plan.index.nbytes - 3 * 2 * 4


@pytest.mark.parametrize(
    "name", ["model.layers.4.eh_proj.weight", "model.layers.1.self_attn.q_b_proj.weight"]
)
def test_source_tensor_that_no_rule_knows_is_refused(name, tmp_path):
    write_tiny_checkpoint(tmp_path, tiny_config("deepseek_v3"))
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(2)}))
    with pytest.raises(CheckpointError, match="1 unknown") as caught:
        plan_conversion(tmp_path)
    assert name in caught.value.found


# A table with a hole is a fault of ours, found before anything is read.


def plan_with_rules(folder, monkeypatch, rules):
    monkeypatch.setattr(tasks_module, "RULES", tuple(rules))
    return plan_of(folder, tiny_config("deepseek_v3"))


def test_target_without_a_rule_is_refused(tmp_path, monkeypatch):
    rules = [rule for rule in RULES if not rule.target.endswith("kda.b.weight")]
    with pytest.raises(MappingError, match=r"0 rules make .*layers\.0\.kda\.b\.weight"):
        plan_with_rules(tmp_path, monkeypatch, rules)


def test_target_with_two_rules_is_refused(tmp_path, monkeypatch):
    rules = [*RULES, Rule("layers.{layer}.kda.b.weight", Op.RANDOM)]
    with pytest.raises(MappingError, match=r"2 rules make .*layers\.0\.kda\.b\.weight"):
        plan_with_rules(tmp_path, monkeypatch, rules)


def test_source_that_no_rule_reads_is_refused(tmp_path, monkeypatch):
    rules = [
        replace(rule, op=Op.ZEROS, sources=()) if rule.op is Op.SCALE_OUTPUT else rule
        for rule in RULES
    ]
    with pytest.raises(MappingError, match=r"3 tensors.*model\.layers\.0\.self_attn\.o_proj"):
        plan_with_rules(tmp_path, monkeypatch, rules)
