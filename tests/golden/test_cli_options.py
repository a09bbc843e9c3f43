"""Every command, argument and option with its default is in cli_options.txt.

Scripts depend on them. After a change that is meant, `UPDATE_GOLDEN=1` rewrites the file, and the
diff is part of the change.
"""

from __future__ import annotations

import os
from pathlib import Path

import typer.main

from kimi_convert import cli

GOLDEN = Path(__file__).with_name("cli_options.txt")


def option_tree():
    return "\n".join(command_lines("kimi-convert", typer.main.get_command(cli.app))) + "\n"


def command_lines(path, command):
    yield path
    yield from sorted(f"  {parameter_text(parameter)}" for parameter in command.params)
    for name, member in sorted(getattr(command, "commands", {}).items()):
        yield from command_lines(f"{path} {name}", member)


def parameter_text(parameter):
    names = " ".join(parameter.opts + parameter.secondary_opts)
    if parameter.param_type_name == "argument":
        names = parameter.metavar
    needed = "required" if parameter.required else f"default={parameter.default!r}"
    return f"{names}  {needed}"


def test_options_are_those_of_the_golden_file():
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(option_tree(), encoding="utf-8")
    assert option_tree() == GOLDEN.read_text(encoding="utf-8")
