"""Checkpoints that every test here only reads."""

from __future__ import annotations

import pytest

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.conversion.engine import convert_checkpoint
from tests.tiny import tiny_config, write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_hybrid(tmp_path_factory):
    """Four layers, KDA but for the last, random in every tensor: no term hides behind a zero."""
    folder = tmp_path_factory.mktemp("parity") / "tiny"
    return write_tiny_checkpoint(folder, tiny_config("kimi_linear"), seed=4)


@pytest.fixture(scope="session")
def example_hybrid(tmp_path_factory):
    """The example, converted without data, which takes a second."""
    output = tmp_path_factory.mktemp("parity") / "hybrid"
    convert_checkpoint(example_checkpoint(), output)
    return output
