"""config.json documents for tests: valid tiny ones, changed field by field, and their errors."""

from __future__ import annotations

import pytest

from kimi_convert.config.huggingface import config_to_json, parse_config
from kimi_convert.errors import ConfigError
from tests.tiny import tiny_config

SOURCES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
KINDS = (*SOURCES, "kimi_linear")
ABSENT = object()  # a field that is left out


def document_of(kind, **changes):
    """Return a valid config.json with fields changed, added or left out."""
    document = config_to_json(tiny_config(kind)) | changes
    return {name: value for name, value in document.items() if value is not ABSENT}


def parsed(kind, **changes):
    return parse_config(document_of(kind, **changes))


def read_back(config):
    return parse_config(config_to_json(config))


def refusal(kind, **changes):
    """Return the error that a changed config.json gives."""
    with pytest.raises(ConfigError) as caught:
        parsed(kind, **changes)
    assert caught.value.where == "config.json"
    return caught.value


def nested(kind, name, **changes):
    """Return a nested object of a valid config.json with fields changed, added or left out."""
    inner = document_of(kind)[name] | changes
    return {key: value for key, value in inner.items() if value is not ABSENT}
