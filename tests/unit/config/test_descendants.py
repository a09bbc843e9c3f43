"""Hybrids after Kimi-Linear: each is told by what its own config.json has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimi_convert.config.descendants import recognise_descendant
from kimi_convert.config.huggingface import config_to_json, parse_config
from kimi_convert.conversion import plan_conversion
from kimi_convert.errors import ConfigError
from kimi_convert.validation import validate_checkpoint
from tests.integration.command_line import run_here
from tests.tiny import tiny_config, write_tiny_checkpoint

FOLDER = Path(__file__).parent / "descendants"  # fields of the published config.json files
FAMILIES = {
    "kimi-k3": (
        "Kimi-K3",
        69,
        93,
        (
            "a forget gate that is bounded from below by -5.0",
            "an output gate of full rank in KDA",
            "an output gate in MLA layers",
            "attention over residuals, in blocks of 12 layers",
            "experts in a latent space of width 3584",
            "the SiTU activation",
        ),
    ),
    "ling-3.0-flash": (
        "Ling-3.0",
        35,
        42,
        (
            "a forget gate that is bounded from below by -5.0",
            "a forget gate and an output gate of full rank in KDA",
            "a head_wise gate in MLA layers",
            "MLA layers that rotate (RoPE, theta 6000000)",
        ),
    ),
    "glm-5.3-flash": (
        "GLM-5.3",
        34,
        45,
        (
            "a forget gate that is bounded from below by -5.0",
            "hyper-connections of 4 residual streams",
            "an indexer that lets MLA layers see 2048 tokens",
            "SwiGLU clamped at 10.0",
        ),
    ),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def document_of(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


@every_family
def test_family_layers_and_features_are_told(name):
    family, kda_layers, num_layers, features = FAMILIES[name]
    found = recognise_descendant(document_of(name))
    assert (found.family, len(found.kda_layers), found.num_layers) == (
        family,
        kda_layers,
        num_layers,
    )
    assert found.features == features
    assert found.kda_layers[:4] == (0, 1, 2, 4 if name != "ling-3.0-flash" else 3)
    assert max(found.kda_layers) < num_layers


def test_text_model_of_k3_alone_is_told_too():
    assert recognise_descendant(document_of("kimi-k3")["text_config"]).family == "Kimi-K3"


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_linear"])
def test_supported_models_are_none(kind):
    assert recognise_descendant(config_to_json(tiny_config(kind))) is None


def test_ling_without_kda_is_none():
    document = document_of("ling-3.0-flash")
    del document["short_conv_kernel_size"]
    assert recognise_descendant(document) is None
    with pytest.raises(ConfigError, match="not supported"):
        parse_config(document)


@every_family
def test_only_what_is_set_is_told(name):
    document = document_of(name)
    text = document.get("text_config", document)
    text.pop("linear_attn_config" if name == "kimi-k3" else "kda_lower_bound", None)
    text["swiglu_limit"] = None
    found = recognise_descendant(document)
    assert len(found.features) < len(FAMILIES[name][3])


@every_family
def test_other_commands_say_which_features_are_missing(name, tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "source", tiny_config("kimi_linear"))
    (folder / "config.json").write_text(json.dumps(document_of(name)))
    for call in (plan_conversion, validate_checkpoint):
        with pytest.raises(ConfigError, match="not supported yet") as caught:
            call(folder)
        assert all(feature in caught.value.found for feature in FAMILIES[name][3])
        assert "inspect" in caught.value.hint


@every_family
def test_inspect_explains_what_it_is(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(document_of(name)))
    done = run_here("inspect", tmp_path)
    assert done.returncode == 0
    assert FAMILIES[name][0] in done.stdout
    assert all(feature[:40] in done.stdout for feature in FAMILIES[name][3])
    told = json.loads(run_here("inspect", tmp_path, "--json").stdout)
    assert told["not_supported"] == list(FAMILIES[name][3])


@pytest.mark.parametrize(
    "fields",
    [
        {"linear_attn_config": 3},
        {"num_hidden_layers": "many"},
        {"num_hidden_layers": 10**12},
        {"linear_attn_config": {"kda_layers": [None, "x", 3]}},
        {"text_config": []},
        {"layer_group_size": 0},
    ],
)
@every_family
def test_hostile_fields_raise_nothing(name, fields):
    document = document_of(name)
    document.get("text_config", document).update(fields)
    recognise_descendant(document)
