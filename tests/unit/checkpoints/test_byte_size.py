"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.checkpoints.byte_size import parse_byte_size
from kimi_convert.errors import UsageError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("800000", 800_000),
        ("12B", 12),
        ("500MB", 500_000_000),
        ("5GB", 5_000_000_000),
        ("2GiB", 2_147_483_648),
        ("1.5 KiB", 1536),
        (" 5gb ", 5_000_000_000),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("0.001kB", 1),
        ("4.3GB", 4_300_000_000),
    ],
)
def test_decimal_and_binary_units(text, nbytes):
    assert parse_byte_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "5G",
        "5 Gb/s",
        "-5GB",
        "0",
        "0GB",
        "0.5",
        "1e9",
        "5,0GB",
        "inf",
        "nan",
        "\u0665GB",
        "1.0000000000000001KB",
        "9" * 100,
        "5GB5",
        "0x10",
        "5GB\n5",
        "1_000",
    ],
)
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="such as 5GB"):
        parse_byte_size(text)


@given(st.integers(1, 10**15), st.sampled_from(["", "B", " B", "b"]))
def test_plain_byte_counts_are_exact(nbytes, unit):
    assert parse_byte_size(f"{nbytes}{unit}") == nbytes


@given(st.text(max_size=12))
def test_any_text_gives_a_size_or_a_usage_error(text):
    try:
        nbytes = parse_byte_size(text)
    except UsageError:
        return
    assert nbytes >= 1
