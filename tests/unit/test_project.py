"""The project around the code: the wheel is complete, the layers hold, help stays light."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kimi_convert"
EXAMPLES = ("moonlet-7m", "text")

LAYERS = "Imports point down the layers, and every module has a layer"
VIOLATIONS = [
    pytest.param("config/new.py", "import kimi_convert.model", LAYERS, id="upward"),
    pytest.param("checkpoints/new.py", "import kimi_convert.kernels", LAYERS, id="sibling"),
    pytest.param("new.py", "", LAYERS, id="stray-module"),
    pytest.param(
        "config/new.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kimi_convert.model",
        LAYERS,
        id="upward-for-types",
    ),
    pytest.param(
        "kernels/new.py",
        "import kimi_convert.config",
        "Kernels know tensors, not models",
        id="kernels-config",
    ),
    pytest.param("model/new.py", "import triton", "triton only in kernels", id="triton"),
    pytest.param(
        "model/new.py",
        "from rich.table import Table",
        "typer and rich only in the command line",
        id="rich",
    ),
    pytest.param(
        "model/new.py",
        "import huggingface_hub",
        "huggingface_hub only in hub",
        id="huggingface_hub",
    ),
    pytest.param("model/new.py", "import onnx.helper", "ONNX only in its exporter", id="onnx"),
    pytest.param(
        "model/new.py",
        "from transformers import AutoConfig",
        "Other implementations are imported in the processes of oracles alone",
        id="transformers",
    ),
    pytest.param(
        "validation/parity/new.py",
        "import kimi_convert.validation.parity.oracles.mlx_lm_model",
        "Nothing imports an oracle: it is run as a process",
        id="oracle",
    ),
]

# typer and rich, and what they bring.
HELP_MAY_LOAD = {
    "annotated_doc",
    "attr",  # rich imports it where something else has brought it
    "click",
    "kimi_convert",
    "markdown_it",
    "mdurl",
    "pygments",
    "rich",
    "shellingham",
    "typer",
    "typing_extensions",
}


def run(*command, cwd, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def broken_contracts(folder):
    done = run(
        "-c",
        "from importlinter.cli import lint_imports_command as main; main()",
        "--no-cache",
        "--no-logo",
        cwd=folder,
        COLUMNS="200",
    )
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    return re.findall(r"^(.+) BROKEN\b", done.stdout, flags=re.MULTILINE)


def test_layers_hold():
    assert broken_contracts(ROOT) == []


@pytest.mark.parametrize(("module", "line", "contract"), VIOLATIONS)
def test_forbidden_import_breaks_its_contract(tmp_path, module, line, contract):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    copy = tmp_path / "kimi_convert"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / module).write_text(line + "\n", encoding="utf-8")
    assert broken_contracts(tmp_path) == [contract]


def test_help_loads_the_command_line_and_nothing_else(tmp_path):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['kimi-convert', '--help']\n"
        "before = set(sys.modules)\n"
        "try:\n"
        "    runpy.run_module('kimi_convert', run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    assert not left.code\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before}, file=sys.stderr)\n"
    )
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.split()) - sys.stdlib_module_names <= HELP_MAY_LOAD


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from the source archive, as package indexes want both to agree."""
    out = tmp_path_factory.mktemp("dist")
    with tarfile.open(out / build("build_sdist", ROOT, out)) as archive:
        # Python 3.11.0 to 3.11.3 have no filters; the archive is ours.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(out / "source", **safe)
    (source,) = (out / "source").iterdir()
    with zipfile.ZipFile(out / build("build_wheel", source, out)) as archive:
        archive.extractall(out / "site")
    return out / "site"


def build(what, source, out):
    code = f"import sys; from hatchling.build import {what}; print({what}(sys.argv[1]))"
    done = run("-c", code, out, cwd=source)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def files_of(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_the_package_as_it_is(wheel):
    packed = files_of(wheel / "kimi_convert")
    packed = {path: content for path, content in packed.items() if path.parts[0] != "_examples"}
    assert packed == files_of(PACKAGE)


@pytest.mark.parametrize("example", EXAMPLES)
def test_wheel_holds_the_examples_as_they_are(wheel, example):
    packed = wheel / "kimi_convert" / "_examples" / example
    assert files_of(packed) == files_of(ROOT / "examples" / example)


def test_wheel_holds_licence_and_notices(wheel):
    (licences,) = wheel.glob("*.dist-info/licenses")
    assert {path.name for path in licences.iterdir()} == {"LICENSE", "NOTICE"}


def test_installed_package_finds_its_examples_outside_a_checkout(wheel, tmp_path):
    code = (
        "from kimi_convert.checkpoints import examples, open_index\n"
        "assert open_index(examples.example_checkpoint()).tensors\n"
        "print(examples.example_checkpoint())\n"
        "print(examples.calibration_text())\n"
        "print(examples.heldout_text())\n"
    )
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(wheel))
    assert done.returncode == 0, done.stderr
    found = [Path(line) for line in done.stdout.splitlines()]
    inside = wheel / "kimi_convert" / "_examples"
    assert [path.relative_to(inside).as_posix() for path in found] == [
        "moonlet-7m",
        "text/calibration.jsonl",
        "text/heldout.jsonl",
    ]
