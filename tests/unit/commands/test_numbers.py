"""Sizes, counts, durations and layer runs as people read them."""

from __future__ import annotations

import pytest

from kimi_convert.commands._numbers import (
    bytes_text,
    count_text,
    files_text,
    layers_text,
    seconds_text,
)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (14_781_592, "14.8 MB"),
        (5 * 10**9, "5.0 GB"),
        (10**18, "1000.0 PB"),
    ],
)
def test_bytes_have_a_decimal_unit_and_four_digits_at_most(nbytes, text):
    assert bytes_text(nbytes) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (224, "224"), (7_375_672, "7.4M"), (1_026_000_000_000, "1.0T")]
)
def test_counts_have_the_letters_of_papers(count, text):
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.00 s"), (9.994, "9.99 s"), (59.6, "1 min 0 s"), (12.0, "12 s"), (7384, "2 h 3 min")],
)
def test_seconds(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("layers", "text"),
    [((), ""), ((3,), "3"), ((0, 1, 2, 4, 5, 6), "0-2, 4-6"), ((3, 7, 8), "3, 7-8")],
)
def test_runs_of_layers_are_shortened(layers, text):
    assert layers_text(layers) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 files"), (1, "1 file"), (2, "2 files")])
def test_one_file_is_not_files(count, text):
    assert files_text(count) == text
