"""What the host does for the CUDA stages, as far as it can be told without a GPU."""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path

import pytest
import torch

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.kda import chunk_kda
from kimi_convert.kernels.kda.cuda import compiler, driver, intra, key_gradients, stage
from tests.unit.kernels.kda.cases import make_inputs

pytest.importorskip("triton")
FOLDER = Path(compiler.__file__).parent
SOURCES = sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")])


def fields(source):
    """The struct format of a source's Arguments, from its text."""
    body = re.search(r"struct Arguments \{(.*?)\n\};", (FOLDER / source).read_text(), re.DOTALL)[1]
    letters = ""
    for line in re.sub(r"//.*", "", body).split(";"):
        declared = line.strip()
        if "*" in declared:
            letters += "P"
        elif declared:
            kind, names = declared.split(maxsplit=1)
            letters += {"int": "i", "float": "f"}[kind] * len(names.split(","))
    return "@" + letters


@pytest.mark.parametrize(
    ("source", "format_"),
    [("intra.cu", intra._PARAMETERS), ("gradients.cuh", key_gradients._PARAMETERS)],
)
def test_the_host_lays_arguments_out_as_the_source_declares_them(source, format_):
    letters = "".join(
        letter * int(count or 1) for count, letter in re.findall(r"(\d*)([Pif])", format_)
    )
    assert "@" + letters == fields(source)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_sources_include_nothing(source):
    assert "#include" not in source.read_text()


def test_the_sources_are_part_of_the_package():
    assert {path.name for path in SOURCES} >= {
        "tiles.cuh",
        "gradients.cuh",
        "intra.cu",
        "key_gradients.cu",
        "key_gradients_steep.cu",
    }


def test_without_nvrtc_the_error_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "0.0")
    with pytest.raises(compiler.CompileError, match="NVRTC") as caught:
        compiler.compile_sources([FOLDER / "intra.cu"], capability=(9, 0), macros={})
    assert caught.value.expected == "libnvrtc.so.0"
    assert "Triton" in caught.value.hint


class FakeDriver:
    """Keeps what a launch hands over."""

    def cuCtxGetCurrent(self, context):
        context._obj.value = 1
        return 0

    def cuGetErrorString(self, result, text):
        text._obj.value = b"out of luck"
        return 0

    def cuLaunchKernel(self, handle, *rest):
        *sizes, stream, parameters, extra = rest
        self.sizes, self.stream, self.parameters = sizes, stream.value, parameters
        count = ctypes.cast(extra[3], ctypes.POINTER(ctypes.c_size_t))[0]
        self.packed = ctypes.string_at(extra[1], count)
        return self.result


@pytest.fixture
def fake_driver(monkeypatch):
    fake = FakeDriver()
    fake.result = 0

    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(driver, "_current_stream", lambda device: 1000 + device)
    return fake


def test_a_launch_hands_over_grid_block_memory_and_arguments(fake_driver):
    kernel = driver.Kernel(ctypes.c_void_p(7), struct.Struct("@2Pif"), 128, 4096)
    kernel.launch(3, (5, 3), (1 << 40, 0, -2, 0.5))
    assert fake_driver.sizes == [5, 3, 1, 128, 1, 1, 4096]
    assert fake_driver.stream == 1003
    assert struct.unpack("@2Pif", fake_driver.packed) == (1 << 40, 0, -2, 0.5)


def test_a_refused_launch_is_our_error(fake_driver):
    fake_driver.result = 701
    kernel = driver.Kernel(ctypes.c_void_p(7), struct.Struct("@P"), 128, 4096)
    with pytest.raises(driver.DriverError, match="out of luck"):
        kernel.launch(0, (1, 1), (0,))


def test_a_call_on_the_cpu_is_refused_and_says_why():
    inputs = make_inputs("weak", 5, K=128, V=128).to(torch.bfloat16)
    with pytest.raises(KernelInputError, match="CUDA stages") as caught:
        chunk_kda(*inputs, backend="cuda")
    assert caught.value.expected == "a CUDA device"


def test_the_bounded_law_of_released_models_needs_no_second_launch():
    assert max(intra._GENTLE_BOUND, key_gradients._GENTLE_BOUND) < -5.0
    # 16 tokens at the bound stay within what the kernels mark.
    limits = {"intra.cu": intra._GENTLE_BOUND, "key_gradients.cu": key_gradients._GENTLE_BOUND}
    for source, bound in limits.items():
        limit = float(re.search(r"#define LIMIT ([\d.]+)f", (FOLDER / source).read_text())[1])
        assert 16 * -bound * 1.4426950408889634 <= limit


def test_pointers_of_nothing_are_0():
    x = torch.zeros(3)
    assert stage.pointers(None, x) == [0, x.data_ptr()]
