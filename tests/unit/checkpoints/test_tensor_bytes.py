"""Tensors to bytes: every dtype and layout, and only what was planned."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from kimi_convert.checkpoints.dtypes import DTYPES, torch_dtype
from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.checkpoints.tensor_bytes import planned_like, tensor_bytes, write_tensor
from kimi_convert.checkpoints.writer import ShardWriter
from kimi_convert.errors import CheckpointError, VerificationError


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path):
    width = DTYPES[dtype].width_bytes
    raw = torch.arange(6 * width).to(torch.uint8) % (2 if dtype == "BOOL" else 251)
    tensor = raw.view(torch_dtype(dtype)).reshape(2, 3)
    shard = plan_shards([planned_like("t", tensor)], 10**9).shards[0]
    with ShardWriter(tmp_path / "x.safetensors", shard) as writer:
        write_tensor(writer, "t", tensor)
        writer.finish()
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        found = file.get_tensor("t")
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert bits(found) == bits(tensor)


BASE = torch.arange(24, dtype=torch.float32)
LAYOUTS = {
    "transposed": BASE.reshape(4, 6).T,
    "strided": BASE[::3],
    "expanded": BASE[:4, None].expand(4, 3),
    "slice of a larger one": BASE.reshape(4, 6)[1:3],
    "scalar": BASE[7],
    "empty": BASE[:0].reshape(0, 5),
    "needs grad": BASE.clone().requires_grad_(),
    "negative zero and nan": torch.tensor([-0.0, float("nan"), float("inf")]),
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_is_written_row_major(tensor):
    assert bytes(tensor_bytes(tensor)) == tensor.detach().numpy().tobytes(order="C")


def test_contiguous_tensor_is_not_copied():
    tensor = torch.zeros(4)
    view = tensor_bytes(tensor)
    tensor.fill_(1)
    assert bytes(view) == torch.ones(4).numpy().tobytes()


def test_unplanned_dtype_cannot_be_planned():
    with pytest.raises(CheckpointError, match="unknown dtype name"):
        planned_like("t", torch.zeros(1, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("t", torch.zeros(2, 3, dtype=torch.float16)),
        ("t", torch.zeros(3, 2)),
        ("t", torch.zeros(6)),
        ("t", torch.zeros(2, 3, dtype=torch.int32)),
        ("u", torch.zeros(2, 3)),
    ],
    ids=["narrower", "transposed", "flat", "same width", "name"],
)
def test_tensor_that_is_not_as_planned_is_refused(tmp_path, name, tensor):
    shard = plan_shards([PlannedTensor("t", "F32", (2, 3))], 10**9).shards[0]
    with ShardWriter(tmp_path / "x", shard) as writer:
        with pytest.raises(VerificationError, match="not as planned"):
            write_tensor(writer, name, tensor)
        write_tensor(writer, "t", torch.zeros(2, 3))
        with pytest.raises(VerificationError, match="not as planned"):
            write_tensor(writer, "t", torch.zeros(2, 3))
