"""Activations in a file: the values of those in memory, bounded pages, and nothing left behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

from kimi_convert.errors import ResourceError
from kimi_convert.validation.activations import Activations, batches

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])


def new(*shape, dtype=torch.float32, on_disk=True):
    return Activations(torch.Size(shape), dtype=dtype, device=CPU, on_disk=on_disk)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_put_in_comes_out(on_disk, dtype):
    values = torch.randn(5, 3, 4).to(dtype)
    kept = new(5, 3, 4, dtype=dtype, on_disk=on_disk)
    for rows in batches(5, 2):
        kept.replace(rows, values[rows])
    copy = kept.clone(batch_rows=2)
    kept.replace(slice(1, 2), torch.zeros(1, 3, 4, dtype=dtype))
    assert torch.equal(copy.values, values)
    assert torch.equal(
        kept.rows(slice(1, 3)), torch.stack((torch.zeros(3, 4).to(dtype), values[2]))
    )
    assert torch.equal(kept.into(lambda hidden: 2 * hidden)(kept.values[4]), 2 * values[4])
    assert len(kept) == 5


@BOTH
def test_values_that_are_not_finite_are_known(on_disk):
    kept = new(2, 1, 2, on_disk=on_disk)
    kept.replace(slice(2), torch.zeros(2, 1, 2))
    assert kept.finite
    kept.replace(slice(1, 2), torch.tensor([[[0.0, float("nan")]]]))
    kept.replace(slice(2), torch.zeros(2, 1, 2))
    assert not kept.finite


def mapped_pages():
    """Bytes of mapped files that are resident."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssFile"))
    (shared,) = (line for line in status.splitlines() if line.startswith("RssShmem"))
    return 1024 * sum(int(one.split()[1]) for one in (line, shared))


def test_memory_holds_one_batch_whatever_the_file_holds():
    batch = torch.ones(4, 1024, 256)  # 4 MiB of 64
    before = mapped_pages()
    kept = new(64, 1024, 256)
    copy = kept.clone(batch_rows=4)
    most = 0
    for rows in batches(64, 4):
        kept.replace(rows, batch)
        copy.replace(rows, kept.rows(rows))
        kept.into(lambda hidden: hidden.sum())(kept.values[rows])
        most = max(most, mapped_pages())
    assert most - before < 3 * batch.nbytes


def test_file_has_no_name_so_none_is_left_however_the_program_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = new(4, 4, 4)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert list(tmp_path.iterdir()) == []
    del kept
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_disk_that_is_full_is_said_with_numbers(monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="cannot keep activations on disk") as caught:
        new(8, 8, 8)
    assert "No space left" in str(caught.value)
    assert "free" in str(caught.value)
