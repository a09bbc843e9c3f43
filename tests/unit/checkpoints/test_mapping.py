"""Naming tables: what they expand to, and how a checkpoint is held against them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.checkpoints.mapping import (
    Drop,
    Dropped,
    Layout,
    Name,
    Storage,
    expand,
    expand_drops,
    holes,
    match,
)
from kimi_convert.errors import CheckpointError, MappingError

NAMES = (
    Name("embed", "model.embed.weight", ("vocab", "hidden")),
    Name("layers.{layer}.q", "model.layers.{layer}.q.weight", ("hidden", "hidden"), "even"),
    Name("layers.{layer}.b", "model.layers.{layer}.b", ("one",), "even", Storage.FP32),
    Name(
        "layers.{layer}.experts.{expert}.up",
        "model.layers.{layer}.e.{expert}.up",
        ("one", "hidden"),
        "odd",
        aliases=("model.layers.{layer}.moe.{expert}.up", "old.{layer}.{expert}"),
    ),
    Name("head", "head.weight", ("vocab", "hidden"), "none"),
)
DROPS = (
    Drop("model.layers.{layer}.rotary", "computed anew"),
    Drop("model.layers.{layer}.e.{expert}.old", "not used", "odd"),
    Drop("model.extra", "of no use", "none"),
)
LAYOUT = Layout(
    layers={"all": (0, 1, 2), "even": (0, 2), "odd": (1,), "none": ()},
    num_experts=2,
    axes={"vocab": 7, "hidden": 4, "one": 1},
)
ENTRIES = expand(NAMES, LAYOUT)
DROPPABLE = expand_drops(DROPS, LAYOUT)
FIRST_EXPERT = "model.layers.1.e.0.up"


@dataclass(frozen=True)
class Stored:
    name: str
    dtype: str
    shape: tuple[int, ...]


STORED = {entry.name: Stored(entry.name, "BF16", entry.shape) for entry in ENTRIES}


def matched(stored, entries=ENTRIES):
    return match(
        entries, stored.values(), droppable=DROPPABLE, dtypes=("F32", "BF16"), where="folder"
    )


def refusal(stored, entries=ENTRIES):
    with pytest.raises(CheckpointError) as caught:
        matched(stored, entries)
    assert caught.value.where == "folder"
    return caught.value


def without(*names):
    return {name: tensor for name, tensor in STORED.items() if name not in names}


def with_more(*names):
    return STORED | {name: Stored(name, "BF16", (1,)) for name in names}


def test_table_expands_row_by_row_to_one_entry_per_tensor():
    assert [(entry.param, entry.name, entry.shape) for entry in ENTRIES] == [
        ("embed", "model.embed.weight", (7, 4)),
        ("layers.0.q", "model.layers.0.q.weight", (4, 4)),
        ("layers.2.q", "model.layers.2.q.weight", (4, 4)),
        ("layers.0.b", "model.layers.0.b", (1,)),
        ("layers.2.b", "model.layers.2.b", (1,)),
        ("layers.1.experts.0.up", "model.layers.1.e.0.up", (1, 4)),
        ("layers.1.experts.1.up", "model.layers.1.e.1.up", (1, 4)),
    ]


def test_entry_knows_its_row_and_its_place():
    entry = ENTRIES[-1]
    assert (entry.layer_idx, entry.expert_idx) == (1, 1)
    assert entry.template == "layers.{layer}.experts.{expert}.up"
    assert entry.aliases == ("model.layers.1.moe.1.up", "old.1.1")
    assert entry.fill("layers.{layer}.x.{expert}.y") == "layers.1.x.1.y"
    assert (ENTRIES[0].layer_idx, ENTRIES[0].expert_idx) == (None, None)
    storage = {entry.template: entry.storage for entry in ENTRIES}
    assert storage["layers.{layer}.b"] is Storage.FP32
    assert storage["layers.{layer}.q"] is Storage.WEIGHT


def test_row_without_layers_in_its_set_does_not_exist():
    assert "head" not in {entry.param for entry in ENTRIES}
    full = replace(LAYOUT, layers={**LAYOUT.layers, "none": (0, 1)})
    assert [entry.param for entry in expand(NAMES, full)].count("head") == 1


def test_drops_expand_with_their_reasons():
    reasons = {
        "model.layers.0.rotary": "computed anew",
        "model.layers.1.rotary": "computed anew",
        "model.layers.2.rotary": "computed anew",
        "model.layers.1.e.0.old": "not used",
        "model.layers.1.e.1.old": "not used",
    }
    assert reasons == DROPPABLE


@pytest.mark.parametrize(
    ("row", "told"),
    [
        pytest.param(Name("embed", "other", ()), "the param 'embed'", id="parameter"),
        pytest.param(
            Name("other", "model.embed.weight", ()), "the name 'model.embed.weight'", id="name"
        ),
        pytest.param(
            Name("other", "other", (), aliases=("model.embed.weight",)),
            "the name 'model.embed.weight'",
            id="alias-that-is-a-name",
        ),
        pytest.param(Name("other", "old.1.0", ()), "the name 'old.1.0'", id="name-of-an-alias"),
        pytest.param(
            Name("other", "other", (), aliases=("old.1.1",)),
            "the name 'old.1.1'",
            id="alias-twice",
        ),
        pytest.param(
            Name("layers.{layer}.r", "same.name", (), "even"),
            "the name 'same.name'",
            id="layers-that-share-a-name",
        ),
    ],
)
def test_rows_that_give_the_same_tensor_are_refused(row, told):
    with pytest.raises(MappingError, match=f"two table rows give {told}"):
        expand((*NAMES, row), LAYOUT)


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("plain.layer.weight", set()),
        ("a.{layer}.b", {"layer"}),
        ("a.{layer}.{expert}.b", {"layer", "expert"}),
        ("a.{{layer}}.b", set()),
    ],
)
def test_holes_of_a_template(template, names):
    assert holes(template) == names


def test_whole_checkpoint_matches():
    found = matched(STORED)
    assert found.entries == ENTRIES
    assert found.stored_names == {entry.param: entry.name for entry in ENTRIES}
    assert found.dropped == ()


def test_order_of_the_tensors_does_not_matter():
    assert matched(dict(reversed(STORED.items()))) == matched(STORED)


def test_what_nothing_reads_is_dropped_with_its_reason():
    found = matched(with_more("model.layers.2.rotary", "model.layers.1.e.0.old"))
    assert found.dropped == (
        Dropped("model.layers.1.e.0.old", "not used"),
        Dropped("model.layers.2.rotary", "computed anew"),
    )
    assert found.stored_names == matched(STORED).stored_names


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.rotary",  # no such layer
        "model.layers.2.rotary.weight",
        "xmodel.layers.2.rotary",
        "model.layers.02.rotary",
        "model.layers.0.e.0.old",  # not an odd layer
        "model.extra",  # its set of layers is empty
        "MODEL.EMBED.WEIGHT",
    ],
)
def test_only_exact_names_are_dropped(name):
    error = refusal(with_more(name))
    assert error.found == f"1 unknown: {name!r}"


@pytest.mark.parametrize("alias", ["model.layers.1.moe.0.up", "old.1.0"])
def test_alias_is_read_in_place_of_the_name(alias):
    stored = without(FIRST_EXPERT) | {alias: Stored(alias, "BF16", (1, 4))}
    assert matched(stored).stored_names["layers.1.experts.0.up"] == alias


@pytest.mark.parametrize(
    "names",
    [
        pytest.param((FIRST_EXPERT, "old.1.0"), id="name-and-alias"),
        pytest.param(("model.layers.1.moe.0.up", "old.1.0"), id="two-aliases"),
    ],
)
def test_tensor_that_is_stored_under_two_names_is_refused_with_both(names):
    stored = without(FIRST_EXPERT) | {name: Stored(name, "BF16", (1, 4)) for name in names}
    error = refusal(stored)
    assert error.message == "checkpoint holds one tensor under two names"
    assert error.found == ", ".join(map(repr, names))
    assert error.hint


def test_alias_of_another_expert_does_not_stand_in():
    error = refusal(without(FIRST_EXPERT))
    assert error.found == f"1 missing: {FIRST_EXPERT!r}"


def test_missing_and_unknown_tensors_are_told_together():
    error = refusal({"a.b": Stored("a.b", "BF16", (1,))} | without("model.layers.0.b"))
    assert error.found == "1 missing: 'model.layers.0.b'; 1 unknown: 'a.b'"
    assert "Download" in error.hint


def test_name_that_is_close_to_a_missing_one_is_suggested():
    stored = without("model.layers.0.b")
    stored["model.layers.0.B"] = Stored("model.layers.0.B", "BF16", (1,))
    assert refusal(stored).hint == "Is 'model.layers.0.B' meant to be 'model.layers.0.b'?"


def test_many_tensors_are_counted_and_the_first_few_named():
    many = expand(NAMES, replace(LAYOUT, num_experts=500))
    error = refusal({}, many)
    assert error.found.startswith("505 missing: 'model.embed.weight', ")
    assert error.found.endswith(" and 495 more")
    assert len(error.found) < 500
    error = refusal(with_more(*(f"extra.{i}" for i in range(2000))))
    assert error.found.startswith("2000 unknown: 'extra.0', 'extra.1'")
    assert error.found.endswith(" and 1990 more")


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nerror: b", "x" * 10**6, "\ud800"], ids=repr)
def test_hostile_name_is_shown_short_and_escaped(name):
    error = refusal(with_more(name))
    assert error.found.isprintable()
    assert len(error.found) < 200
    shaped = [replace(ENTRIES[0], name=name)]
    error = refusal({name: Stored(name, "BF16", (1,))}, shaped)
    assert error.message.isprintable()
    assert len(error.message) < 200


@pytest.mark.parametrize(
    "shape", [(4, 7), (7,), (7, 4, 1), (1, 7, 4), (), (8, 4), (7, 0)], ids=str
)
def test_wrong_shape_is_refused_with_both_shapes(shape):
    name = "model.embed.weight"
    error = refusal(STORED | {name: Stored(name, "BF16", shape)})
    assert error.message == f"tensor {name!r} has the wrong shape"
    assert (error.expected, error.found) == ("[7, 4]", str(list(shape)))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I32", "F64", "bf16", ""])
def test_dtype_that_is_no_weight_is_refused_with_those_that_are(dtype):
    name = "model.layers.2.b"
    error = refusal(STORED | {name: Stored(name, dtype, (1,))})
    assert error.message == f"tensor {name!r} has a dtype that is not a plain weight"
    assert (error.expected, error.found) == ("BF16, F32", dtype)


def test_alias_is_checked_like_the_name():
    stored = without(FIRST_EXPERT) | {"old.1.0": Stored("old.1.0", "BF16", (4, 1))}
    assert "'old.1.0' has the wrong shape" in refusal(stored).message


def test_dropped_tensors_may_have_any_shape_and_dtype():
    name = "model.layers.0.rotary"
    assert matched(STORED | {name: Stored(name, "I64", (56,))}).dropped


@given(
    st.sets(st.sampled_from(sorted(STORED))),
    st.sets(st.sampled_from([*sorted(DROPPABLE), "extra.1", "extra.2"])),
)
def test_a_checkpoint_matches_only_if_all_of_it_is_accounted_for(missing, more):
    stored = without(*missing) | {name: Stored(name, "BF16", (1,)) for name in more}
    if missing or not more <= set(DROPPABLE):
        error = refusal(stored)
        assert all(f"{name!r}" in error.found for name in missing)
        assert ("missing" in error.found) is bool(missing)
    else:
        found = matched(stored)
        assert set(found.stored_names.values()) | {one.name for one in found.dropped} == set(
            stored
        )
