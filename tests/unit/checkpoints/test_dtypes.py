"""The dtype table against torch and against the safetensors library."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from kimi_convert.checkpoints.dtypes import DTYPES, dtype_from_torch_name, torch_dtype
from kimi_convert.errors import CheckpointError
from tests.unit.checkpoints.raw_files import entry, raw_file


@pytest.mark.parametrize("name", DTYPES)
def test_width_is_that_of_torch(name):
    assert torch_dtype(name).itemsize == DTYPES[name].width_bytes


@pytest.mark.parametrize("name", DTYPES)
def test_library_reads_every_dtype_as_the_one_of_the_table(name, tmp_path):
    nbytes = 3 * DTYPES[name].width_bytes
    path = tmp_path / "one.safetensors"
    path.write_bytes(raw_file({"t": entry(name, [3], 0, nbytes)}, bytes(nbytes)))
    with safe_open(path, "pt") as file:
        assert file.get_tensor("t").dtype == torch_dtype(name)


@pytest.mark.parametrize("name", DTYPES)
def test_torch_name_leads_back(name):
    assert dtype_from_torch_name(str(torch_dtype(name)).removeprefix("torch.")) == name


def test_no_two_rows_share_a_torch_name():
    assert len({row.torch_name for row in DTYPES.values()}) == len(DTYPES)


def test_unknown_torch_name_lists_the_known_ones():
    with pytest.raises(CheckpointError, match="bfloat16") as caught:
        dtype_from_torch_name("torch.bfloat16")
    assert "'torch.bfloat16'" in caught.value.found


def test_unknown_dtype_is_refused():
    with pytest.raises(CheckpointError, match="BF16"):
        torch_dtype("F4")


def test_complex_tensors_have_no_name():
    with pytest.raises(CheckpointError):
        dtype_from_torch_name(str(torch.complex64).removeprefix("torch."))
