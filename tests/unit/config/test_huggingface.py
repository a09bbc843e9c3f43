"""Reading config.json: files that are not one JSON object, and model types that are not known."""

from __future__ import annotations

import json
import os
import resource
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.config.huggingface import (
    CONFIG_FILE,
    config_to_json,
    parse_config,
    read_config,
    read_json_object,
)
from kimi_convert.errors import ConfigError
from tests.tiny import tiny_config
from tests.unit.config.documents import KINDS, document_of

LARGEST = 16 * 1024 * 1024


@pytest.fixture
def folder(tmp_path):
    def write(content):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / CONFIG_FILE).write_bytes(data)
        return tmp_path

    return write


def refusal(path):
    with pytest.raises(ConfigError) as caught:
        read_json_object(path / CONFIG_FILE)
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_config_of_a_folder_is_read(folder, kind):
    config = tiny_config(kind)
    assert read_config(folder(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize("kind", KINDS)
def test_first_reading_is_what_every_later_one_gives(kind):
    config = parse_config(document_of(kind))
    assert parse_config(config_to_json(config)) == config


@pytest.mark.parametrize(
    "model_type", ["llama", "", None, "deepseek_v3 ", "DeepSeek_V3", "__class__", "\x1b[2J"]
)
def test_unknown_architecture_is_refused_with_those_that_are_known(model_type):
    with pytest.raises(ConfigError) as caught:
        parse_config({"model_type": model_type})
    error = caught.value
    assert "'model_type'" in error.message
    assert (
        error.expected
        == "bailing_hybrid, deepseek_v2, deepseek_v3, kimi_k2, kimi_k25, kimi_linear, kimi_vl"
    )
    assert error.found.isprintable()
    assert error.where == "config.json"


@pytest.mark.parametrize("model_type", [3, ["llama"], {"a": 1}, True], ids=repr)
def test_model_type_that_is_no_text_is_refused(model_type):
    with pytest.raises(ConfigError, match="'model_type'"):
        parse_config({"model_type": model_type})


def test_empty_config_is_refused():
    with pytest.raises(ConfigError, match="'model_type'"):
        parse_config({})


def test_error_inside_says_which_file(folder):
    document = document_of("deepseek_v3", n_group=3)
    path = folder(json.dumps(document))
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert caught.value.where == str(path / CONFIG_FILE)


def test_missing_file_says_which_folder(tmp_path):
    error = refusal(tmp_path)
    assert (error.message, error.where) == ("config.json is missing", str(tmp_path))
    assert error.hint


@pytest.mark.parametrize(
    ("content", "message", "found"),
    [
        pytest.param("", "not readable JSON", "line 1", id="empty"),
        pytest.param('{\n"a" 1}', "not readable JSON", "line 2", id="broken"),
        pytest.param('{"a": 1} x', "not readable JSON", "Extra data", id="more-after-it"),
        pytest.param('{"a": NaN}', "not readable JSON", "NaN is not JSON", id="nan"),
        pytest.param('{"a": -Infinity}', "not readable JSON", "-Infinity", id="infinity"),
        pytest.param(b'{"a": "\xff"}', "not readable JSON", "utf-8", id="not-utf-8"),
        pytest.param('{"a": 1}'.encode("utf-16"), "not readable JSON", "utf-8", id="utf-16"),
        pytest.param(b"\xef\xbb\xbf{}", "not readable JSON", "BOM", id="byte-order-mark"),
        pytest.param("[" * 100_000, "not readable JSON", "recursion", id="nested-lists"),
        pytest.param('{"a":' * 100_000, "not readable JSON", "recursion", id="nested-objects"),
        pytest.param("[1, 2]", "must hold a JSON object", "list", id="list"),
        pytest.param("null", "must hold a JSON object", "NoneType", id="null"),
        pytest.param('"text"', "must hold a JSON object", "str", id="text"),
        pytest.param('{"a": 1, "b": 2, "a": 3}', "'a' is given twice", "1 and 3", id="twice"),
        pytest.param(
            '{"o": {"a": 1, "a": 1}}', "'a' is given twice", "1 and 1", id="twice-inside"
        ),
        pytest.param('{"\\u001b[2J": 1, "\\u001b[2J": 1}', r"'\x1b[2J'", "1", id="hostile-name"),
        pytest.param(f'{{"a": {"9" * 5000}}}', "'a' is not valid", "too large", id="5000-digits"),
        pytest.param(f'{{"a": -{"9" * 5000}}}', "'a' is not valid", "too large", id="negative"),
        pytest.param('{"a": 1e999}', "'a' is not valid", "too large", id="exponent"),
        pytest.param('{"a": -1e999}', "'a' is not valid", "too large", id="negative-exponent"),
        pytest.param(f'{{"a": [1, [{"9" * 5000}]]}}', "'a' is not", "too large", id="in-a-list"),
        pytest.param('{"a": [{"b": 1e999}]}', "'b' is not valid", "too large", id="in-an-object"),
    ],
)
def test_file_that_is_not_one_sound_object_is_refused(folder, content, message, found):
    path = folder(content)
    error = refusal(path)
    assert message in error.message
    assert found in error.found
    assert error.where == str(path / CONFIG_FILE)


def test_deep_but_sound_nesting_is_read(folder):
    assert read_json_object(folder('{"a":' + "[" * 100 + "]" * 100 + "}") / CONFIG_FILE)


def test_long_whole_numbers_are_read_exactly(folder):
    number = 10**999 + 1
    assert read_json_object(folder(f'{{"a": {number}}}') / CONFIG_FILE) == {"a": number}


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "n_routed_experts"])
@pytest.mark.parametrize("digits", [10, 30, 1000, 1001, 4300, 4301, 100_000])
def test_number_of_any_length_is_refused_by_the_name_of_its_field(folder, name, digits):
    document = json.dumps(document_of("deepseek_v3", **{name: "?"})).replace('"?"', "9" * digits)
    with pytest.raises(ConfigError, match=f"'{name}' is not valid"):
        read_config(folder(document))


@pytest.mark.parametrize("size", [LARGEST, LARGEST + 1])
def test_size_of_the_file_is_bounded(folder, size):
    path = folder(b'{"a": 1}' + b" " * (size - 8))
    if size <= LARGEST:
        assert read_json_object(path / CONFIG_FILE) == {"a": 1}
    else:
        error = refusal(path)
        assert error.message == "config.json is too large"
        assert (error.expected, error.found) == (f"at most {LARGEST} bytes", f"{size} bytes")
        assert error.where == str(path / CONFIG_FILE)


def test_endless_file_is_refused_before_it_is_read(tmp_path):
    (tmp_path / CONFIG_FILE).touch()
    os.truncate(tmp_path / CONFIG_FILE, 2**40)
    assert "too large" in refusal(tmp_path).message


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, make):
    make(tmp_path / CONFIG_FILE)
    error = refusal(tmp_path)
    assert error.message == "config.json is not a plain file"
    assert error.where == str(tmp_path / CONFIG_FILE)


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "not readable" in refusal(tmp_path / "file").message


def test_hostile_config_takes_little_memory(folder):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    document = document_of("kimi_linear", num_hidden_layers=10**9, linear_attn_config=None)
    with pytest.raises(ConfigError, match="'num_hidden_layers'"):
        read_config(folder(json.dumps(document)))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 * 1024


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), value=json_values)
def test_any_value_in_any_field_gives_a_config_or_a_config_error(kind, data, value):
    document = document_of(kind)
    name = data.draw(st.sampled_from(sorted(document)))
    with suppress(ConfigError):  # anything else is a bug
        assert parse_config(document | {name: value}).model_type == kind
