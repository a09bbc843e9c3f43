"""Layer lists of Kimi-Linear: from 1 in the released spelling, one entry per layer in the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.config.fields import Fields
from kimi_convert.config.layer_lists import kda_layers_of, leading_dense_layers
from kimi_convert.errors import ConfigError

LINEAR, FULL = "linear_attention", "full_attention"
DENSE, SPARSE = "dense", "sparse"
TYPES = [LINEAR, LINEAR, LINEAR, FULL]


def kda_layers(kda=None, full=None, types=None, num_layers=4):
    fields = Fields({"layer_types": types}, where="f.json")
    linear = fields.inside("linear_attn_config", {"kda_layers": kda, "full_attn_layers": full})
    return kda_layers_of(fields, linear, num_layers)


def dense_layers(num_layers=4, **document):
    return leading_dense_layers(Fields(document, where="f.json"), num_layers)


def test_lists_count_from_one():
    assert kda_layers([1, 2, 3], [4]) == (0, 1, 2)


def test_lists_may_be_in_any_order():
    assert kda_layers([3, 1], [4, 2]) == (0, 2)


def test_one_list_may_be_empty():
    assert kda_layers([1, 2, 3, 4], []) == (0, 1, 2, 3)
    assert kda_layers([], [1, 2, 3, 4]) == ()


def test_types_count_by_place():
    assert kda_layers(types=TYPES) == (0, 1, 2)


def test_both_spellings_may_say_the_same():
    assert kda_layers([1, 2, 3], [4], TYPES) == (0, 1, 2)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_both_spellings_of_any_pattern_agree(pattern):
    kda = [i + 1 for i, linear in enumerate(pattern) if linear]
    full = [i + 1 for i, linear in enumerate(pattern) if not linear]
    types = [LINEAR if linear else FULL for linear in pattern]
    size = len(pattern)
    assert kda_layers(kda, full, types, size) == tuple(layer - 1 for layer in kda)


NOT_LAYERS = [
    pytest.param([0, 1, 2], [3], "linear_attn_config.kda_layers", "[0]", id="kda-from-zero"),
    pytest.param([1, 2, 3], [0], "linear_attn_config.full_attn_layers", "[0]", id="full-from-0"),
    pytest.param([1, 2, 5], [3, 4], "linear_attn_config.kda_layers", "[5]", id="beyond"),
    pytest.param([-1, 2, 3], [4, 1], "linear_attn_config.kda_layers", "[-1]", id="negative"),
    pytest.param([1, 2, 2], [3, 4], "linear_attn_config.kda_layers", "[1, 2, 2]", id="twice"),
    pytest.param([1, 2, 3], [3, 4], "linear_attn_config.kda_layers", "[3]", id="overlap"),
    pytest.param([1, 2], [4], "linear_attn_config.kda_layers", "[3]", id="left-out"),
    pytest.param([1, 2, 3], None, "linear_attn_config.kda_layers", "[4]", id="one-list-missing"),
    pytest.param([True], [2], "linear_attn_config.kda_layers", "True", id="boolean"),
    pytest.param([1.0], [2], "linear_attn_config.kda_layers", "1.0", id="float"),
    pytest.param(3, [1, 2, 4], "linear_attn_config.kda_layers", "3", id="number-for-a-list"),
    pytest.param("1", [2], "linear_attn_config.kda_layers", "'1'", id="text"),
]


@pytest.mark.parametrize(("kda", "full", "name", "found"), NOT_LAYERS)
def test_lists_that_are_not_the_layers_are_refused_by_name(kda, full, name, found):
    with pytest.raises(ConfigError) as caught:
        kda_layers(kda, full)
    assert name in caught.value.message
    assert found in caught.value.found


def test_list_from_zero_is_told_how_to_count():
    with pytest.raises(ConfigError, match="count from 1, not from 0"):
        kda_layers([0, 1, 2], [3])
    with pytest.raises(ConfigError) as caught:
        kda_layers([1, 2, 3], [5])
    assert "not from 0" not in caught.value.expected


def test_long_lists_make_short_messages():
    with pytest.raises(ConfigError) as caught:
        kda_layers(list(range(1, 100_000)), [4])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("kda", "full"), [(None, None), ([], []), (None, [])], ids=["absent", "empty", "one-empty"]
)
def test_loaders_would_guess_missing_lists_so_they_are_refused(kda, full):
    with pytest.raises(ConfigError, match="'linear_attn_config' lists no layers") as caught:
        kda_layers(kda, full)
    assert caught.value.hint


@pytest.mark.parametrize(
    "types",
    [
        pytest.param(TYPES[:3], id="short"),
        pytest.param([*TYPES, FULL], id="long"),
        pytest.param([*TYPES[:3], "sliding_attention"], id="unknown"),
        pytest.param([*TYPES[:3], 1], id="not-text"),
        pytest.param([], id="empty"),
        pytest.param(LINEAR, id="no-list"),
    ],
)
def test_types_that_are_not_the_layers_are_refused(types):
    with pytest.raises(ConfigError, match="'layer_types' is not valid"):
        kda_layers(types=types)


def test_spellings_that_contradict_each_other_are_refused_by_name():
    with pytest.raises(ConfigError) as caught:
        kda_layers([1, 2], [3, 4], TYPES)
    assert "'linear_attn_config' and 'layer_types'" in caught.value.message
    assert caught.value.expected == "KDA layers [1, 2] (counted from 1)"
    assert caught.value.found == "[1, 2, 3]"


@pytest.mark.parametrize(
    ("document", "dense"),
    [
        pytest.param({}, 0, id="nothing"),
        pytest.param({"first_k_dense_replace": 1}, 1, id="number"),
        pytest.param({"first_k_dense_replace": 9}, 9, id="more-than-there-are"),
        pytest.param({"mlp_layer_types": [DENSE, SPARSE, SPARSE, SPARSE]}, 1, id="types"),
        pytest.param({"mlp_layer_types": [SPARSE] * 4}, 0, id="no-dense-type"),
        pytest.param({"mlp_layer_types": [DENSE] * 4}, 4, id="all-dense-types"),
        pytest.param(
            {"first_k_dense_replace": 9, "mlp_layer_types": [DENSE] * 4}, 4, id="both-all-dense"
        ),
        pytest.param(
            {"first_k_dense_replace": 1, "mlp_layer_types": [DENSE, SPARSE, SPARSE, SPARSE]},
            1,
            id="both",
        ),
    ],
)
def test_leading_dense_layers(document, dense):
    assert dense_layers(**document) == dense


@pytest.mark.parametrize(
    "types",
    [
        pytest.param([SPARSE, DENSE, SPARSE, SPARSE], id="dense-after-sparse"),
        pytest.param([DENSE, SPARSE, SPARSE], id="short"),
        pytest.param([DENSE, SPARSE, SPARSE, SPARSE, SPARSE], id="long"),
        pytest.param([DENSE, SPARSE, SPARSE, "other"], id="unknown"),
        pytest.param([DENSE] * 5, id="more-dense-than-layers"),
    ],
)
def test_mlp_types_that_are_not_the_layers_are_refused(types):
    with pytest.raises(ConfigError, match="'mlp_layer_types' is not valid"):
        dense_layers(mlp_layer_types=types)


def test_dense_layers_that_contradict_each_other_are_refused_by_name():
    with pytest.raises(ConfigError, match="'first_k_dense_replace' and 'mlp_layer_types'"):
        dense_layers(first_k_dense_replace=2, mlp_layer_types=[DENSE, SPARSE, SPARSE, SPARSE])
