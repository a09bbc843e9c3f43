"""Released models: what their config.json says, and the tensors that follow from it.

`configs/` holds their config.json, of moonshotai and deepseek-ai on https://huggingface.co; that of
DeepSeek-V3 is DeepSeek-R1's, which has the same architecture. `tensors/` holds one
line for each kind of tensor: how many, their shape, their dtype where it is fixed, and the name of
the first. After a change that is meant, `UPDATE_GOLDEN=1` rewrites `tensors/`, and the diff is part
of the change. The counts in this file are facts about the published files and never rewritten.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest

from kimi_convert.checkpoints.mapping import Storage
from kimi_convert.config.architecture import Scoring, TopkMethod
from kimi_convert.config.huggingface import config_to_json, parse_config, read_config
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.target import target_config
from kimi_convert.model.names.layout import expected_entries

FOLDER = Path(__file__).parent
MODELS = (
    "moonlight-16b-a3b",
    "deepseek-v2-lite",
    "deepseek-v3",
    "kimi-k2-instruct",
    "kimi-linear-48b-a3b",
)
# Of the published safetensors: DeepSeek-V3 without its MTP layer.
TENSORS = {
    "moonlight-16b-a3b": 5_317,
    "deepseek-v2-lite": 5_291,
    "kimi-linear-48b-a3b": 20_493,
}
PARAMETERS = {
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "kimi-linear-48b-a3b": 49_122_681_728,
}
# Kimi-K2 is published in fp8: a scale beside each matrix but the routers', embedding and head,
# and a rotary_emb.inv_freq in each of its 61 layers.
KIMI_K2_PUBLISHED_TENSORS = 139_644
KIMI_LINEAR_MLA_LAYERS = (3, 7, 11, 15, 19, 23, 26)  # from 0; arXiv 2510.26692 counts from 1

every_model = pytest.mark.parametrize("model", MODELS)


def document_of(model):
    return json.loads((FOLDER / "configs" / f"{model}.json").read_text(encoding="utf-8"))


def config_of(model):
    return parse_config(document_of(model))


def tensor_lines(model):
    entries = expected_entries(config_of(model))
    counts = Counter(entry.template for entry in entries)
    first = {entry.template: entry for entry in reversed(entries)}
    for entry in entries:
        if first[entry.template] is entry:
            axes = "x".join(map(str, entry.shape))
            dtype = "F32" if entry.storage is Storage.FP32 else "weight"
            yield f"{counts[entry.template]:>6} {axes:<12} {dtype:<6} {entry.name}\n"


@every_model
def test_released_config_is_understood_and_written_without_loss(model):
    document = document_of(model)
    written = config_to_json(parse_config(document))
    # The new spelling is written for the old one; null is what an absent field means.
    expected = {("dtype" if name == "torch_dtype" else name): document[name] for name in document}
    assert {name: written.get(name) for name in expected} == expected
    added = {name: written[name] for name in written.keys() - expected.keys()}
    assert added == {
        name: value
        for name, value in {
            "pad_token_id": None,
            "rope_scaling": None,
            "num_nextn_predict_layers": 0,
        }.items()
        if name not in expected
    }


@every_model
def test_config_that_is_written_is_read_back(model):
    config = config_of(model)
    assert parse_config(json.loads(json.dumps(config_to_json(config)))) == config


@every_model
def test_file_on_disk_reads_like_its_document(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(document_of(model)), encoding="utf-8")
    assert read_config(tmp_path) == config_of(model)


@pytest.mark.parametrize(("model", "count"), TENSORS.items(), ids=TENSORS)
def test_number_of_tensors_is_that_of_the_published_checkpoint(model, count):
    assert len(expected_entries(config_of(model))) == count


@pytest.mark.parametrize(("model", "count"), PARAMETERS.items(), ids=PARAMETERS)
def test_number_of_parameters_is_that_of_the_published_checkpoint(model, count):
    entries = expected_entries(config_of(model))
    assert sum(math.prod(entry.shape) for entry in entries) == count


def test_kimi_k2_has_the_published_number_of_tensors_with_its_scales():
    entries = expected_entries(config_of("kimi-k2-instruct"))
    routers = "layers.{layer}.moe.router.weight"
    scaled = sum(
        len(entry.shape) == 2 and entry.layer_idx is not None and entry.template != routers
        for entry in entries
    )
    assert len(entries) + scaled + 61 == KIMI_K2_PUBLISHED_TENSORS


def test_kimi_linear_keeps_the_published_layers():
    config = config_of("kimi-linear-48b-a3b")
    assert config.mla_layers == KIMI_LINEAR_MLA_LAYERS
    assert Recipe().kept_layers(config.num_layers) == KIMI_LINEAR_MLA_LAYERS
    assert config.mla.rope is None


@pytest.mark.parametrize(
    ("model", "m"),
    [
        # 0.1 mscale_all_dim ln(factor) + 1, to five places.
        ("deepseek-v2-lite", 1.26080),
        ("deepseek-v3", 1.36889),
        ("kimi-k2-instruct", 1.34657),
        ("moonlight-16b-a3b", 1.0),
    ],
)
def test_softmax_scale_has_the_factor_of_yarn(model, m):
    mla = config_of(model).mla
    assert mla.softmax_scale * 192**0.5 == pytest.approx(m * m, abs=3e-5)  # 2 m x half a unit
    if mla.rope.yarn:
        assert mla.rope.yarn.rotation_factor == 1.0


@pytest.mark.parametrize(
    ("model", "scoring", "method", "groups"),
    [
        ("moonlight-16b-a3b", Scoring.SIGMOID, TopkMethod.NOAUX_TC, (1, 1)),
        ("deepseek-v2-lite", Scoring.SOFTMAX, TopkMethod.GREEDY, (1, 1)),
        ("deepseek-v3", Scoring.SIGMOID, TopkMethod.NOAUX_TC, (8, 4)),
        ("kimi-k2-instruct", Scoring.SIGMOID, TopkMethod.NOAUX_TC, (1, 1)),
        ("kimi-linear-48b-a3b", Scoring.SIGMOID, TopkMethod.NOAUX_TC, (1, 1)),
    ],
)
def test_routing_of_released_models(model, scoring, method, groups):
    moe = config_of(model).moe
    assert (moe.scoring, moe.topk_method) == (scoring, method)
    assert (moe.num_groups, moe.topk_groups) == groups


def test_moonlight_becomes_a_hybrid_of_the_released_pattern():
    target = target_config(config_of("moonlight-16b-a3b"), Recipe())
    assert target.mla_layers == KIMI_LINEAR_MLA_LAYERS
    released = document_of("kimi-linear-48b-a3b")
    spelled = config_to_json(target)
    # Its own tokenizer and code are not the target's business.
    assert set(released) - set(spelled) == {"auto_map", "transformers_version"}
    assert spelled["linear_attn_config"].keys() == released["linear_attn_config"].keys()


@every_model
def test_tensors_are_those_of_the_golden_file(model):
    golden = FOLDER / "tensors" / f"{model}.txt"
    text = "".join(tensor_lines(model))
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
