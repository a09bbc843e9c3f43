"""What the package exports, and that nothing of it imports torch before a tensor is made."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import kimi_convert.checkpoints as package
from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.checkpoints.written import WrittenShard
from tests.unit.checkpoints.raw_files import write_checkpoint

BYTES_AND_NAMES = (
    "byte_size",
    "background",
    "disk",
    "dtypes",
    "file_kinds",
    "hashing",
    "index",
    "messages",
    "output",
    "written",
    "reader",
    "regular_file",
    "safetensors_header",
    "shard_plan",
    "staging",
    "strict_json",
    "weight_map",
    "writer",
)


def test_every_public_name_is_there():
    assert len(package.__all__) <= 10
    assert all(getattr(package, name) for name in package.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="none"):
        _ = package.none


def test_names_and_bytes_need_no_torch():
    imports = ", ".join(f"kimi_convert.checkpoints.{name}" for name in BYTES_AND_NAMES)
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_what_workers_exchange_can_be_sent_to_another_process(tmp_path):
    index = open_index(write_checkpoint(tmp_path, {"one.safetensors": {"a": b"x"}}))
    plan = plan_shards([PlannedTensor("a", "U8", (1,))], 10**9)
    written = WrittenShard("one", 1, "00", {"a": "00"})
    for item in (index, plan, written):
        assert pickle.loads(pickle.dumps(item)) == item
