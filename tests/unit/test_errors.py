"""Errors: the exit code of each class, the line they read as, and their JSON document."""

from __future__ import annotations

import copy
import json

import pytest

from kimi_convert import errors

EXIT_CODES = {
    "KimiConvertError": 1,
    "UsageError": 2,
    "InputError": 3,
    "ConfigError": 3,
    "CheckpointError": 3,
    "MappingError": 3,
    "RecipeError": 3,
    "TokenizerError": 3,
    "TooLittleTextError": 3,
    "CalibrationError": 3,
    "OutputError": 3,
    "KernelInputError": 3,
    "HubError": 4,
    "ResourceError": 5,
    "VerificationError": 6,
}
INPUT_ERRORS = sorted(name for name, code in EXIT_CODES.items() if code == 3)
PARTS = ("where", "expected", "found", "hint")


def classes():
    return {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}


def test_every_class_has_the_exit_code_that_is_documented():
    assert {name: kind.exit_code for name, kind in classes().items()} == EXIT_CODES


def test_module_docstring_names_every_class_and_every_exit_code():
    words = errors.__doc__.replace(".", " ").split()
    assert set(EXIT_CODES) <= set(words)
    assert {str(code) for code in (*EXIT_CODES.values(), 130)} <= set(words)


@pytest.mark.parametrize("name", INPUT_ERRORS)
def test_whoever_catches_input_errors_catches_all_of_them(name):
    assert issubclass(classes()[name], errors.InputError)


@pytest.mark.parametrize("name", sorted(EXIT_CODES))
def test_whoever_catches_the_base_catches_everything(name):
    assert issubclass(classes()[name], errors.KimiConvertError)


def test_kernel_input_is_also_a_value_error():
    with pytest.raises(ValueError, match=r"^wrong shape$"):
        raise errors.KernelInputError("wrong shape")


def test_no_other_class_hides_among_python_errors():
    builtin = {
        name
        for name, kind in classes().items()
        if issubclass(kind, ValueError | TypeError | OSError | RuntimeError)
    }
    assert builtin == {"KernelInputError"}


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        pytest.param({}, "bad", id="message-alone"),
        pytest.param({"where": "f.json"}, "bad (in f.json)", id="where"),
        pytest.param({"expected": 3}, "bad (expected 3)", id="expected"),
        pytest.param({"found": [1, 2]}, "bad (found [1, 2])", id="found"),
        pytest.param({"found": 0}, "bad (found 0)", id="found-zero"),
        pytest.param({"hint": "Do it."}, "bad", id="the-hint-is-for-another-line"),
        pytest.param(
            {"where": "w", "expected": "e", "found": "f", "hint": "h"},
            "bad (in w, expected e, found f)",
            id="everything",
        ),
    ],
)
def test_line_says_what_where_expected_and_found(parts, line):
    assert str(errors.InputError("bad", **parts)) == line


def test_json_document_has_every_part_as_text():
    error = errors.ConfigError("bad", where="w", expected=[1], found=2.5, hint="h")
    assert error.to_json() == {
        "error": {
            "type": "ConfigError",
            "message": "bad",
            "where": "w",
            "expected": "[1]",
            "found": "2.5",
            "hint": "h",
            "exit_code": 3,
        }
    }


def test_json_document_leaves_no_part_out_where_nothing_is_known():
    document = errors.HubError("bad").to_json()["error"]
    assert [document[part] for part in PARTS] == [""] * 4


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\x00", "\ud800", '"}'])
def test_json_document_of_a_hostile_message_is_plain_ascii(text):
    document = json.dumps(errors.InputError(text, found=text).to_json())
    assert document.isascii()
    assert document.isprintable()
    assert json.loads(document)["error"]["message"] == text


def test_message_is_what_python_shows_first():
    error = errors.InputError("bad", hint="Do it.")
    assert error.args == ("bad",)


def test_copy_keeps_every_part():
    error = errors.ResourceError("bad", where="w", expected="e", found="f", hint="h")
    assert copy.copy(error).to_json() == error.to_json()
