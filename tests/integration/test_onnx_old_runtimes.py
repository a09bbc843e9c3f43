"""Graphs run on ONNX Runtimes that have no kernel for KDA: the functions they bring are the bodies.

Old versions are installed without their dependencies into pytest's cache, once; without a package
index these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kimi_convert
from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.exporters.onnx.export import export_onnx
from kimi_convert.exporters.onnx.options import (
    CustomBody,
    MlaForm,
    MoeForm,
    OnnxOptions,
    Target,
)
from kimi_convert.model.loading import load_model
from tests.integration.command_line import run_here
from tests.unit.exporters.onnx.comparison import FP32_BOUND, error, reference_run, reference_states

pytestmark = pytest.mark.slow

VERSIONS = ("1.20.1", "1.24.1")
FORMS = {
    "ort": OnnxOptions(moe=MoeForm.ACTIVE),
    "ort, latent MLA": OnnxOptions(moe=MoeForm.ACTIVE, mla=MlaForm.LATENT),
    "custom, portable": OnnxOptions(target=Target.CUSTOM),
    "custom, nested": OnnxOptions(target=Target.CUSTOM, custom_body=CustomBody.NESTED),
}
PIECES = ",".join(map(str, (61, 1, 2, *[1] * 64)))
INSTALL = ("-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:")

RUN = """
import sys
import numpy as np
import onnxruntime
from kimi_convert.exporters.onnx.session import OnnxSession

version, folder, given, sizes, output = sys.argv[1:]
assert onnxruntime.__version__ == version, onnxruntime.__version__
session = OnnxSession(folder, threads=1)
tokens = np.load(given)
states = session.new_states(len(tokens))
parts, start = [], 0
for size in map(int, sizes.split(",")):
    parts.append(session.run(tokens[:, start : start + size], states))
    start += size
kept = {name: value.numpy() for name, value in states.values.items()}
np.savez(output, logits=np.concatenate(parts, axis=1), **kept)
"""


@pytest.fixture(scope="module", params=VERSIONS)
def runtime(request):
    """Return a version of ONNX Runtime and the folder that it is installed in."""
    version = request.param
    folder = Path(request.config.cache.mkdir("onnxruntime")) / version
    if not folder.exists():
        unfinished = folder.with_name(f"{version}.{os.getpid()}")
        package = f"onnxruntime=={version}"
        done = subprocess.run(
            [sys.executable, *INSTALL, "--target", str(unfinished), package],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            shutil.rmtree(unfinished, ignore_errors=True)
            pytest.skip(f"{package} cannot be installed: {done.stderr.strip()[-200:]}")
        unfinished.rename(folder)
    return version, folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    done = run_here("convert", example_checkpoint(), folder / "hybrid", "--no-text", "--quiet")
    assert done.returncode == 0, done.stderr
    tokens = np.random.default_rng(2).integers(5, 4096, (1, 128))
    np.save(folder / "tokens.npy", tokens)
    for name, options in FORMS.items():
        export_onnx(folder / "hybrid", folder / name, options=options)
    model = load_model(folder / "hybrid")
    logits, cache = reference_run(model, tokens)
    return folder, logits, reference_states(model, cache)


@pytest.mark.parametrize("form", FORMS)
def test_old_runtimes_give_the_reference_s_logits_and_states(runtime, hybrid, tmp_path, form):
    (version, installed), (folder, wanted, wanted_states) = runtime, hybrid
    output = tmp_path / "run.npz"
    package = Path(kimi_convert.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", RUN, version, folder / form, folder / "tokens.npy", PIECES, output],
        env={**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{package}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(output)
    assert error(found["logits"], wanted) <= FP32_BOUND
    if FORMS[form].mla is MlaForm.MATERIALISED:
        for name, state in wanted_states.items():
            assert error(found[name][..., : state.shape[-1]], state) <= FP32_BOUND, name
