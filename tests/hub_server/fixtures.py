"""A running Hub for the tests of a module, and the environment in which it is the Hub.

from tests.hub_server.fixtures import *
"""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import constants

from kimi_convert.hub import remote
from kimi_convert.hub.failures import RetryPolicy
from tests.hub_server import serve

TOKEN = "hf_" + "Secret" * 6
USER = "tester"

__all__ = ["TOKEN", "USER", "hub", "hub_environment", "hub_process"]


@pytest.fixture(scope="module")
def hub_process(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("hub")) as server:
        server.store.users[TOKEN] = USER
        yield server


@pytest.fixture
def hub(hub_process, tmp_path, monkeypatch):
    """An empty Hub; commands that run in this process or in another use it, without long waits."""
    hub_process.reset()
    for name, value in hub_environment(hub_process, tmp_path).items():
        monkeypatch.setenv(name, value)
    # huggingface_hub reads its environment when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf-home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(remote, "DEFAULT_POLICY", RetryPolicy(4, 0.01, 0.05))
    yield hub_process
    huggingface_hub.close_session()


def hub_environment(server, tmp_path):
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_CACHE": str(tmp_path / "hf-home" / "hub"),
        "HF_TOKEN": TOKEN,
        "HF_TOKEN_PATH": str(tmp_path / "hf-home" / "token"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
