"""Bounds of config fields, and how refused values are shown."""

from __future__ import annotations

import pytest

from kimi_convert.config.limits import require, require_size, shown
from kimi_convert.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param("plain", "'plain'", id="text"),
        pytest.param("\x1b[31m\n", r"'\x1b[31m\n'", id="control-characters"),
        pytest.param("\u202e\ud800", r"'\u202e\ud800'", id="not-printable"),
        pytest.param("\u0430", r"'\u0430'", id="letter-that-looks-like-a"),
        pytest.param((1, 2), "[1, 2]", id="tuple-as-json-would"),
        pytest.param(None, "None", id="none"),
        pytest.param("x" * 78, "'" + "x" * 78 + "'", id="as-long-as-it-may-be"),
        pytest.param("x" * 79, "'" + "x" * 79 + "...", id="longer"),
        pytest.param(10**5000, "a number of more than 4300 digits", id="huge-integer"),
        pytest.param([10**5000], "a number of more than 4300 digits", id="huge-integer-in-a-list"),
    ],
)
def test_shown_values_are_short_and_safe(value, text):
    assert shown(value) == text


def test_long_list_is_cut_before_it_is_written():
    class Watched(int):
        def __repr__(self):
            raise AssertionError("too many items are looked at")

    assert shown([1] * 20 + [Watched()] * 5) == str([1] * 20)


def test_require_lets_pass_what_holds():
    require(True, "x", "e", "f")


def test_require_names_the_field_and_both_spellings():
    with pytest.raises(ConfigError) as caught:
        require(False, "old or new", "one thing", "other")
    assert caught.value.message == "config field 'old' or 'new' is not valid"
    assert (caught.value.expected, caught.value.found) == ("one thing", "'other'")


@pytest.mark.parametrize("value", [1, 2, 7])
def test_size_within_its_bounds_passes(value):
    require_size("x", value, 7)


@pytest.mark.parametrize("value", [-1, 0, 8, 10**30, 10**5000], ids=shown)
def test_size_outside_its_bounds_is_refused(value):
    with pytest.raises(ConfigError, match=r"'x'.*expected a number from 1 to 7"):
        require_size("x", value, 7)


def test_least_size_may_be_zero():
    require_size("x", 0, 7, least=0)
    with pytest.raises(ConfigError, match="from 0 to 7"):
        require_size("x", -1, 7, least=0)
