"""Typed reading of one JSON object: types, bounds, spellings, and what is left over."""

from __future__ import annotations

import pytest

from kimi_convert.config.fields import Fields, same
from kimi_convert.config.limits import MAX_INTEGER, shown
from kimi_convert.errors import ConfigError

NOT_WHOLE = [True, False, 1.0, 1.5, "1", [1], {"a": 1}]
NOT_NUMBERS = [True, False, "1", [1.0], {}]
NOT_FINITE = [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 10**5000]
TOO_LARGE = [MAX_INTEGER + 1, -MAX_INTEGER - 1, 10**30, -(10**30), 10**5000]


def fields(**document):
    return Fields(document, where="f.json")


def refused(read, *arguments, **options):
    with pytest.raises(ConfigError) as caught:
        read(*arguments, **options)
    assert caught.value.where == "f.json"
    return caught.value


@pytest.mark.parametrize("value", [0, 5, -5, MAX_INTEGER, -MAX_INTEGER])
def test_integer_reads_whole_numbers(value):
    assert fields(x=value).integer("x") == value
    assert fields(x=value).optional_integer("x") == value
    assert fields(x=value).integers("x") == (value,)


@pytest.mark.parametrize("read", ["integer", "optional_integer", "integers"])
@pytest.mark.parametrize("value", [case for case in NOT_WHOLE if case != [1]], ids=repr)
def test_whole_number_of_another_type_is_refused(read, value):
    error = refused(getattr(fields(x=value), read), "x")
    assert error.message == "config field 'x' is not valid"
    assert error.expected == "a whole number"
    assert error.found == repr(value)


def test_list_in_place_of_a_number_is_refused():
    assert refused(fields(x=[1]).integer, "x").expected == "a whole number"
    assert refused(fields(x=[1]).optional_integer, "x").expected == "a whole number"


@pytest.mark.parametrize("value", TOO_LARGE, ids=["max", "min", "1e30", "-1e30", "5000-digits"])
@pytest.mark.parametrize("read", ["integer", "optional_integer", "integers"])
def test_whole_number_out_of_bounds_is_refused(read, value):
    error = refused(getattr(fields(x=value), read), "x")
    assert "'x'" in error.message
    assert error.expected == f"a whole number from {-MAX_INTEGER} to {MAX_INTEGER}"


@pytest.mark.parametrize("value", [2, 9])
def test_a_read_may_set_narrower_bounds(value):
    assert fields(x=3).integer("x", least=3, most=8) == 3
    assert fields(x=8).integer("x", least=3, most=8) == 8
    error = refused(fields(x=value).integer, "x", least=3, most=8)
    assert error.expected == "a whole number from 3 to 8"


@pytest.mark.parametrize("value", [0, 3, -2.5, 1e-6])
def test_number_reads_numbers_as_floats(value):
    for number in (fields(x=value).number("x"), fields(x=value).optional_number("x")):
        assert number == value
        assert isinstance(number, float)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
@pytest.mark.parametrize("read", ["number", "optional_number"])
def test_number_of_another_type_is_refused(read, value):
    assert refused(getattr(fields(x=value), read), "x").expected == "a number"


@pytest.mark.parametrize("value", NOT_FINITE, ids=["nan", "inf", "-inf", "1e400", "-1e400", "5k"])
@pytest.mark.parametrize("read", ["number", "optional_number"])
def test_number_that_is_not_finite_is_refused(read, value):
    assert refused(getattr(fields(x=value), read), "x").expected == "a finite number"


@pytest.mark.parametrize("value", [0, 1, "true", None], ids=repr)
def test_only_true_and_false_are_booleans(value):
    refused(fields(x=value).boolean, "x")
    assert fields(x=True).boolean("x") is True
    assert fields(x=False).boolean("x", default=True) is False


@pytest.mark.parametrize("value", [0, ["a"], {"a": 1}, True], ids=repr)
def test_only_strings_are_text(value):
    assert refused(fields(x=value).text, "x").expected == "a string"
    assert fields(x="a").text("x") == "a"


@pytest.mark.parametrize("read", ["integer", "number", "boolean", "text"])
@pytest.mark.parametrize("document", [{}, {"x": None}], ids=["absent", "null"])
def test_missing_field_is_refused_unless_it_has_a_default(read, document):
    error = refused(getattr(Fields(document, where="f.json"), read), "x", "also")
    assert error.message == "config field 'x' is missing"
    default = {"integer": 3, "number": 2.5, "boolean": True, "text": "t"}[read]
    assert getattr(fields(**document), read)("x", "also", default=default) == default


@pytest.mark.parametrize(
    "read", ["optional_integer", "optional_number", "texts", "numbers", "mapping", "nested", "raw"]
)
@pytest.mark.parametrize("document", [{}, {"x": None}], ids=["absent", "null"])
def test_optional_field_may_be_missing(read, document):
    assert getattr(fields(**document), read)("x") is None


@pytest.mark.parametrize("read", ["integers", "integer_list"])
@pytest.mark.parametrize(
    ("document", "items"),
    [({}, ()), ({"x": None}, ()), ({"x": []}, ()), ({"x": [3, 1]}, (3, 1))],
    ids=["absent", "null", "empty", "two"],
)
def test_lists_of_whole_numbers_keep_their_order(read, document, items):
    assert getattr(fields(**document), read)("x") == items


def test_one_number_is_no_list_where_a_list_is_asked_for():
    assert fields(x=3).integers("x") == (3,)
    assert refused(fields(x=3).integer_list, "x").expected == "a list of whole numbers"


@pytest.mark.parametrize("item", [*NOT_WHOLE, None, *TOO_LARGE], ids=shown)
@pytest.mark.parametrize("read", ["integers", "integer_list"])
def test_every_item_of_a_list_is_checked(read, item):
    assert "'x'" in refused(getattr(fields(x=[1, item]), read), "x").message


def test_list_of_numbers():
    assert fields(x=[1, 2.5]).numbers("x") == (1.0, 2.5)
    assert refused(fields(x=3).numbers, "x").expected == "a list of numbers"
    assert refused(fields(x=[1, True]).numbers, "x").expected == "a number"
    assert refused(fields(x=[1, float("nan")]).numbers, "x").expected == "a finite number"


@pytest.mark.parametrize("value", ["a", [], [1], ["a", None], {"a": "b"}, 3], ids=repr)
def test_texts_are_a_list_of_strings(value):
    assert refused(fields(x=value).texts, "x").expected == "a list of strings"
    assert fields(x=["a", "b"]).texts("x") == ("a", "b")


@pytest.mark.parametrize("value", ["a", [], 3, True], ids=repr)
@pytest.mark.parametrize("read", ["mapping", "nested"])
def test_objects_are_objects(read, value):
    assert refused(getattr(fields(x=value), read), "x").expected == "an object"


def test_nested_field_is_named_with_its_path():
    inner = fields(a={"b": {"c": "no"}}).nested("a").nested("b")
    assert refused(inner.integer, "c").message == "config field 'a.b.c' is not valid"
    assert refused(inner.integer, "d").message == "config field 'a.b.d' is missing"


def test_object_that_is_not_there_reads_like_an_empty_one():
    inner = fields().inside("a", {})
    assert refused(inner.integer, "c").message == "config field 'a.c' is missing"
    inner.refuse_rest()


@pytest.mark.parametrize("names", [("old", "new"), ("new", "old")])
def test_both_spellings_may_say_the_same(names):
    assert fields(old=3, new=3).integer(*names) == 3


@pytest.mark.parametrize(("old", "new"), [(3, 4), (1, True), (0, False), ({"a": 1}, {"a": 2})])
def test_spellings_that_contradict_each_other_are_refused_by_name(old, new):
    some = fields(old=old, new=new)
    error = refused(some.mapping if isinstance(old, dict) else some.integer, "old", "new")
    assert error.message == "config fields 'old' and 'new' contradict each other"
    assert error.found == f"{old!r} and {new!r}"


def test_spellings_of_a_nested_field_are_named_with_their_path():
    inner = fields(a={"old": 3, "new": 4}).nested("a")
    assert "'a.old' and 'a.new'" in refused(inner.integer, "old", "new").message


@pytest.mark.parametrize("null", ["old", "new"])
def test_null_spelling_says_nothing(null):
    assert fields(**{"old": 3, "new": 3, null: None}).integer("old", "new") == 3


def test_wrong_value_is_told_by_the_spelling_that_is_there():
    assert "'new'" in refused(fields(new="x").integer, "old", "new").message
    assert "'new'" in refused(fields(new="x").number, "old", "new").message
    assert "'new'" in refused(fields(new=1).text, "old", "new").message
    assert "'new'" in refused(fields(new=1).boolean, "old", "new").message
    assert "'new'" in refused(fields(new=1).mapping, "old", "new").message


@pytest.mark.parametrize("value", [True, 1, 1.0], ids=repr)
def test_expect_keeps_true_apart_from_one(value):
    allowed = fields(x=value)
    if value is True:
        allowed.expect("x", True)
    else:
        assert refused(allowed.expect, "x", True, None).expected == "True or None"


def test_expect_asks_nothing_of_what_is_absent_and_leaves_fields_unread():
    fields().expect("x", 3)
    allowed = fields(x=3)
    allowed.expect("x", 3)
    assert allowed.rest() == {"x": 3}
    refused(fields(x=None).expect, "x", 3)


def test_rest_is_what_no_read_asked_for():
    some = fields(a=1, b=2, c=3, d=4)
    some.integer("c")
    some.integer("zz", "a", default=0)
    assert some.rest() == {"b": 2, "d": 4}
    some.integer("b")
    some.raw("d")
    some.refuse_rest()


def test_unknown_field_is_refused_with_the_name_that_it_is_close_to():
    inner = fields(a={"short_conf_size": 3}).nested("a")
    inner.integer("short_conv_size", default=4)
    inner.integer("seed", default=0)
    error = refused(inner.refuse_rest)
    assert error.message.startswith("config field 'a.short_conf_size' is not known here")
    assert error.expected == "a.seed, a.short_conv_size"
    assert error.found == "3"
    assert error.hint == "Is 'a.short_conv_size' meant?"


def test_unknown_field_close_to_nothing_has_another_hint():
    some = fields(zzz="\x1b")
    some.integer("seed", default=0)
    error = refused(some.refuse_rest)
    assert error.found == r"'\x1b'"
    assert "meant" not in error.hint
    assert error.hint


def test_unknown_field_that_is_null_says_nothing():
    fields(x=None).refuse_rest()


def test_hostile_field_name_is_escaped():
    assert r"'\x1b[31m'" in refused(Fields({"\x1b[31m": 1}, where="f.json").refuse_rest).message


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [(1, 1, True), (1, True, False), (False, 0, False), (True, True, True), (1, 1.0, True)],
)
def test_same_keeps_booleans_apart(left, right, equal):
    assert same(left, right) is equal
