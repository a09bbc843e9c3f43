"""The error boundary, help and the public names, as scripts and people rely on them."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.main

import kimi_convert
from kimi_convert import cli, errors
from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.model import summary
from tests.integration.command_line import command, environment, run_cli

HEAVY = ("torch", "numpy", "huggingface_hub", "tokenizers", "transformers", "safetensors")


def all_commands(group=None, path=()):
    group = group or typer.main.get_command(cli.app)
    for name, member in group.commands.items():
        if hasattr(member, "commands"):
            yield from all_commands(member, (*path, name))
        else:
            yield (*path, name), member


def fail_with(error):
    def summarize(folder):
        raise error

    return summarize


@pytest.fixture
def failing(monkeypatch):
    """Let `inspect` fail with the given exception."""

    def arrange(error):
        monkeypatch.setattr(summary, "summarize_checkpoint", fail_with(error))

    return arrange


FAILURES = [
    pytest.param(errors.UsageError("no"), 2, id="UsageError"),
    pytest.param(errors.InputError("no"), 3, id="InputError"),
    pytest.param(errors.ConfigError("no"), 3, id="ConfigError"),
    pytest.param(errors.CheckpointError("no"), 3, id="CheckpointError"),
    pytest.param(errors.MappingError("no"), 3, id="MappingError"),
    pytest.param(errors.RecipeError("no"), 3, id="RecipeError"),
    pytest.param(errors.TokenizerError("no"), 3, id="TokenizerError"),
    pytest.param(errors.CalibrationError("no"), 3, id="CalibrationError"),
    pytest.param(errors.TooLittleTextError("no"), 3, id="TooLittleTextError"),
    pytest.param(errors.OutputError("no"), 3, id="OutputError"),
    pytest.param(errors.KernelInputError("no"), 3, id="KernelInputError"),
    pytest.param(errors.HubError("no"), 4, id="HubError"),
    pytest.param(errors.ResourceError("no"), 5, id="ResourceError"),
    pytest.param(MemoryError(), 5, id="MemoryError"),
    pytest.param(OSError(errno.ENOSPC, "No space left on device"), 5, id="full-disk"),
    pytest.param(OSError(errno.EDQUOT, "Disk quota exceeded"), 5, id="quota"),
    pytest.param(OSError(errno.ENOMEM, "Cannot allocate memory"), 5, id="no-memory-for-map"),
    pytest.param(torch.OutOfMemoryError("CUDA out of memory"), 5, id="gpu-memory"),
    pytest.param(errors.VerificationError("no"), 6, id="VerificationError"),
    pytest.param(ValueError("surprise"), 1, id="bug"),
    pytest.param(PermissionError(errno.EACCES, "Permission denied"), 1, id="other-os-error"),
    pytest.param(KeyboardInterrupt(), 130, id="interrupt"),
]


@pytest.mark.parametrize(("error", "exit_code"), FAILURES)
def test_error_is_told_on_stderr_with_its_exit_code(failing, capsys, error, exit_code):
    failing(error)
    assert cli.main(["inspect", "x"]) == exit_code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert "Traceback" not in told.err


@pytest.mark.parametrize(("error", "exit_code"), FAILURES)
def test_json_error_is_one_document_on_stdout(failing, capsys, error, exit_code):
    failing(error)
    assert cli.main(["inspect", "x", "--json"]) == exit_code
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert set(document) == {"error"}
    assert set(document["error"]) == {
        "type",
        "message",
        "where",
        "expected",
        "found",
        "hint",
        "exit_code",
    }
    assert document["error"]["exit_code"] == exit_code
    assert told.err == ""


def test_every_error_class_has_a_failure_above():
    tried = {type(case.values[0]) for case in FAILURES}
    known = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    assert known - tried == {errors.KimiConvertError}


def test_error_shows_every_part(failing, capsys):
    failing(
        errors.CheckpointError("bad shape", where="w", expected="[2]", found="[3]", hint="Do it.")
    )
    cli.main(["inspect", "x"])
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        ["error:", "bad", "shape"],
        ["where:", "w"],
        ["expected:", "[2]"],
        ["found:", "[3]"],
        ["hint:", "Do", "it."],
    ]


def test_error_does_not_let_a_file_steer_the_terminal(failing, capsys):
    failing(errors.CheckpointError("name \x1b[31m", found="\x1b]0;title\x07"))
    cli.main(["inspect", "x"])
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert "\\x1b[31m" in told


def test_memory_that_the_system_refuses_to_torch_is_a_resource_error(failing, capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    failing(caught.value)
    assert cli.main(["inspect", "x"]) == 5
    assert "not enough memory" in capsys.readouterr().err


def test_bug_shows_its_traceback_only_with_verbose(failing, capsys):
    failing(ValueError("surprise"))
    assert cli.main(["inspect", "x", "--verbose"]) == 1
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert "ValueError: surprise" in told


def test_user_error_shows_no_traceback_with_verbose(failing, capsys):
    failing(errors.InputError("no"))
    cli.main(["inspect", "x", "--verbose"])
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["inspect"], "CHECKPOINT", id="missing-argument"),
        pytest.param(["inspect", "x", "--jsn"], "--json", id="unknown-option-near-match"),
        pytest.param(["inspct"], "'inspect'", id="unknown-command-near-match"),
        pytest.param(["inspect", "x", "y"], "y", id="extra-argument"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_usage_error_exits_2_and_names_the_culprit(capsys, arguments, said, as_json):
    assert cli.main([*arguments, *(["--json"] if as_json else [])]) == 2
    told = capsys.readouterr()
    if as_json:
        error = json.loads(told.out)["error"]
        assert error["type"] == "UsageError"
        assert said in error["message"]
        assert told.err == ""
    else:
        assert said in told.err
        assert told.out == ""


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kimi-convert {kimi_convert.__version__}\n"


def test_no_arguments_show_help(capsys):
    assert cli.main([]) == 0
    told = capsys.readouterr().out
    assert all(path[0] in told for path, _ in all_commands())


@pytest.mark.parametrize("path", [pytest.param(p, id="-".join(p)) for p, _ in all_commands()])
def test_every_command_has_an_example_and_the_three_output_options(path):
    member = dict(all_commands())[path]
    assert f"kimi-convert {' '.join(path)}" in member.epilog
    options = {name for parameter in member.params for name in parameter.opts}
    assert {"--json", "--quiet", "--verbose"} <= options


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([*path, "--help"] for path, _ in all_commands()), ["--version"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from kimi_convert.cli import main\n"
        f"assert main({arguments!r}) == 0\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_reader_that_leaves_early_ends_the_command_quietly(tmp_path):
    with subprocess.Popen(
        command("inspect", example_checkpoint()),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait() == 141
    assert said == b""


def run_into(stdout, stderr, *arguments):
    """Run with the streams sent elsewhere, in a shell's words; return the exit code and the rest."""
    done = subprocess.run(
        ["sh", "-c", f'"$@" >{stdout} 2>{stderr}', "sh", *command(*arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_full_disk_behind_stdout_is_told_on_stderr_with_exit_5(options):
    code, _, said = run_into("/dev/full", "&2", "inspect", example_checkpoint(), *options)
    assert code == 5
    lines = said.splitlines()
    assert lines[0] == "error: standard output cannot be written"
    assert lines[1].split(maxsplit=1) == ["found:", "No space left on device"]
    assert "Traceback" not in said


@pytest.mark.parametrize("stderr", ["/dev/full", "&-"])
def test_stderr_that_takes_nothing_leaves_the_exit_code(stderr):
    assert run_into("&1", stderr, "inspect", "/nonexistent") == (3, "", "")


def test_closed_stdout_is_no_error():
    assert run_into("&-", "&2", "inspect", example_checkpoint()) == (0, "", "")


def test_pipe_gets_plain_text():
    done = run_cli("inspect", "/nonexistent")
    assert done.returncode == 3
    assert "\x1b" not in done.stderr + done.stdout


def test_forced_colour_gives_colour():
    assert "\x1b" in run_cli("inspect", "/nonexistent", FORCE_COLOR="1").stderr


def test_no_color_wins_over_a_terminal():
    done = run_cli("inspect", "/nonexistent", FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b[31" not in done.stderr
    assert "\x1b[1;31" not in done.stderr


def test_public_names_are_few_and_all_resolve():
    assert len(kimi_convert.__all__) <= 12
    for name in kimi_convert.__all__:
        assert getattr(kimi_convert, name) is not None
    assert dir(kimi_convert) == kimi_convert.__all__


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_job"):
        kimi_convert.no_such_job  # noqa: B018
