"""Names and sizes in messages are short and cannot drive a terminal."""

from __future__ import annotations

import pytest

from kimi_convert.checkpoints.messages import listed, quoted, sized


def test_control_characters_are_escaped():
    assert quoted("a\x1b[31m\n\u202e") == r"'a\x1b[31m\n\u202e'"


def test_long_names_are_cut():
    assert len(quoted("x" * 1_000_000)) < 130


def test_long_lists_are_counted():
    names = [f"n{i}" for i in range(22)]
    assert listed(names).endswith("'n9' and 12 more")


def test_short_lists_are_whole():
    assert listed(["a", "b"]) == "'a', 'b'"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1000 bytes (1.0 kB)"),
        (5_368_709_120, "5368709120 bytes (5.4 GB)"),
        (10**18, "1000000000000000000 bytes (1000000.0 TB)"),
    ],
)
def test_sizes_are_exact_and_readable(nbytes, text):
    assert sized(nbytes) == text
