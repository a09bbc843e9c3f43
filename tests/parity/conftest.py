"""Checkpoints that every test here only reads."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_config, write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_hybrid(tmp_path_factory):
    """Four layers, KDA but for the last, random in every tensor: no term hides behind a zero."""
    folder = tmp_path_factory.mktemp("parity") / "tiny"
    return write_tiny_checkpoint(folder, tiny_config("kimi_linear"), seed=4)
