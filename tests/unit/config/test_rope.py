"""RoPE in config.json: both spellings, YaRN, and what is refused."""

from __future__ import annotations

import pytest

from kimi_convert.config.architecture import RopeConfig, YarnConfig
from kimi_convert.config.fields import Fields
from kimi_convert.config.rope import parse_rope, rope_to_json
from kimi_convert.errors import ConfigError

YARN = {
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.5,
}
CONFIG = YarnConfig(
    factor=40.0,
    original_max_positions=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=0.707,
    mscale_all_dim=0.5,
)
OLD = YARN | {"type": "yarn"}
NEW = YARN | {"rope_type": "yarn", "rope_theta": 50000.0}
DEFAULT = {"rope_type": "default", "rope_theta": 50000.0}


def rope(**document):
    return parse_rope(Fields(document, where="f.json"))


def refusal(**document):
    with pytest.raises(ConfigError) as caught:
        rope(**document)
    return caught.value


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        pytest.param({}, RopeConfig(theta=10000.0), id="nothing"),
        pytest.param(
            {"rope_theta": None, "rope_scaling": None}, RopeConfig(theta=10000.0), id="null"
        ),
        pytest.param({"rope_theta": 50000}, RopeConfig(theta=50000.0), id="old-theta"),
        pytest.param(
            {"rope_parameters": {"rope_theta": 50000}}, RopeConfig(theta=50000.0), id="new-theta"
        ),
        pytest.param({"rope_parameters": DEFAULT}, RopeConfig(theta=50000.0), id="new-default"),
        pytest.param(
            {"rope_theta": 50000, "rope_scaling": OLD},
            RopeConfig(theta=50000.0, yarn=CONFIG),
            id="old-yarn",
        ),
        pytest.param(
            {"rope_parameters": NEW}, RopeConfig(theta=50000.0, yarn=CONFIG), id="new-yarn"
        ),
        pytest.param(
            {"rope_parameters": NEW | {"type": "yarn", "attention_factor": None}},
            RopeConfig(theta=50000.0, yarn=CONFIG),
            id="as-transformers-writes-it",
        ),
        pytest.param(
            {"rope_theta": 50000, "rope_scaling": OLD, "rope_parameters": NEW},
            RopeConfig(theta=50000.0, yarn=CONFIG),
            id="both-the-same",
        ),
        pytest.param(
            {"rope_theta": 50000, "rope_scaling": NEW},
            RopeConfig(theta=50000.0, yarn=CONFIG),
            id="theta-in-the-scaling-too",
        ),
        pytest.param(
            {"rope_interleave": False}, RopeConfig(theta=10000.0, interleaved=False), id="halves"
        ),
        pytest.param(
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 8,
                }
            },
            RopeConfig(
                theta=10000.0,
                yarn=YarnConfig(
                    factor=2.0,
                    original_max_positions=8,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    mscale=1.0,
                    mscale_all_dim=0.0,
                ),
            ),
            id="yarn-defaults",
        ),
    ],
)
def test_rope_is_read_in_both_spellings(document, expected):
    assert rope(**document) == expected


@pytest.mark.parametrize(
    ("document", "names"),
    [
        pytest.param(
            {"rope_theta": 10000, "rope_parameters": DEFAULT},
            ("rope_theta", "rope_parameters.rope_theta"),
            id="theta",
        ),
        pytest.param(
            {"rope_theta": 10000, "rope_scaling": NEW},
            ("rope_theta", "rope_scaling.rope_theta"),
            id="theta-in-the-scaling",
        ),
        pytest.param(
            {"rope_theta": 0, "rope_parameters": DEFAULT},
            ("rope_theta", "rope_parameters.rope_theta"),
            id="theta-of-zero",
        ),
        pytest.param(
            {"rope_scaling": OLD, "rope_parameters": NEW | {"factor": 41}},
            ("rope_scaling", "rope_parameters"),
            id="factor",
        ),
        pytest.param(
            {"rope_scaling": OLD, "rope_parameters": DEFAULT},
            ("rope_scaling", "rope_parameters"),
            id="yarn-and-default",
        ),
        pytest.param(
            {"rope_scaling": {"type": "default"}, "rope_parameters": NEW},
            ("rope_scaling", "rope_parameters"),
            id="default-and-yarn",
        ),
        pytest.param(
            {"rope_scaling": OLD | {"rope_type": "default"}},
            ("rope_scaling.rope_type", "rope_scaling.type"),
            id="two-types",
        ),
    ],
)
def test_spellings_that_contradict_each_other_are_refused_by_name(document, names):
    error = refusal(**document)
    assert error.message.endswith("contradict each other")
    assert all(repr(name) in error.message for name in names)
    assert " and " in error.found


@pytest.mark.parametrize(
    ("document", "name"),
    [
        pytest.param({"rope_theta": -5}, "rope_theta", id="negative-theta"),
        pytest.param({"rope_theta": 1}, "rope_theta", id="theta-of-one"),
        pytest.param({"rope_theta": "x"}, "rope_theta", id="theta-text"),
        pytest.param({"rope_theta": float("nan")}, "rope_theta", id="theta-nan"),
        pytest.param({"rope_interleave": 1}, "rope_interleave", id="interleave-number"),
        pytest.param({"rope_scaling": []}, "rope_scaling", id="scaling-list"),
        pytest.param({"rope_scaling": 4.0}, "rope_scaling", id="scaling-number"),
        pytest.param({"rope_parameters": "yarn"}, "rope_parameters", id="parameters-text"),
        pytest.param({"rope_scaling": {"type": "linear"}}, "rope_scaling", id="unknown-type"),
        pytest.param({"rope_scaling": {"type": 3}}, "rope_scaling.type", id="type-number"),
        pytest.param(
            {"rope_scaling": OLD | {"factor": None}}, "rope_scaling.factor", id="no-factor"
        ),
        pytest.param(
            {"rope_scaling": OLD | {"factor": 0.5}}, "rope_scaling.factor", id="small-factor"
        ),
        pytest.param(
            {"rope_scaling": OLD | {"beta_fast": True}}, "rope_scaling.beta_fast", id="boolean"
        ),
        pytest.param(
            {"rope_scaling": OLD | {"attention_factor": 2}},
            "rope_scaling.attention_factor",
            id="unknown-field",
        ),
        pytest.param(
            {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
            id="unknown-field-without-yarn",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(document, name):
    assert repr(name) in refusal(**document).message


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("yarn", [None, CONFIG], ids=["plain", "yarn"])
def test_rope_that_is_written_is_read_back(interleaved, yarn):
    config = RopeConfig(theta=50000.0, interleaved=interleaved, yarn=yarn)
    assert rope(**rope_to_json(config)) == config


def test_nothing_is_written_where_nothing_rotates():
    assert rope_to_json(None) == {}
