"""Measure the memory that `kimi-convert convert` takes on a checkpoint of Moonlight's shape.

    python -m kimi_convert.bench.convert_memory [--folder DIR] [--layers N] [--json]

The source has the config, names and shapes of Moonlight-16B-A3B, but its weights are holes: 32 GB
to a reader, next to nothing on disk. The output is as large, and real; both are removed at the
end, also after Ctrl-C. Nothing here imports torch: Linux counts what a process was before `exec`
into its peak, so the parent of what is measured must be small.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from kimi_convert.checkpoints.mapping import Storage
from kimi_convert.checkpoints.output import CONFIG_FILE
from kimi_convert.checkpoints.shard_plan import PlannedTensor, plan_shards
from kimi_convert.checkpoints.weight_map import INDEX_FILE
from kimi_convert.config.huggingface import parse_config
from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion import plan_conversion
from kimi_convert.errors import KimiConvertError, ResourceError, VerificationError
from kimi_convert.model.names.layout import expected_entries

# config.json of https://huggingface.co/moonshotai/Moonlight-16B-A3B, without its code references.
MOONLIGHT: Mapping[str, object] = MappingProxyType(
    {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 163584,
        "eos_token_id": 163586,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11264,
        "kv_lora_rank": 512,
        "max_position_embeddings": 8192,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 163840,
    }
)
_SHARD_BYTES = 5 * 10**9
_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertMemory:
    """What one conversion took."""

    read_bytes: int
    written_bytes: int
    planned_peak_bytes: int  # of tensors, as the plan states it
    peak_bytes: int  # resident set of the whole process: Python, torch and tensors
    seconds: float  # of the conversion itself, without the start of Python

    @property
    def megabytes_per_second(self) -> float:
        """10^6 bytes written per second."""
        return self.written_bytes / 1e6 / self.seconds

    def to_json(self) -> dict[str, object]:
        """Return the fields and the speed."""
        return {**asdict(self), "megabytes_per_second": round(self.megabytes_per_second, 1)}


def measure_conversion(folder: Path, document: Mapping[str, object]) -> ConvertMemory:
    """Convert a sparse checkpoint in a new process and measure it.

    Args:
        folder: empty; holds source and output afterwards.
        document: config.json of the source.

    Raises:
        ConfigError: the config is not that of a model which can be converted.
        VerificationError: the conversion failed; what it said is on stderr.
    """
    source, output = folder / "source", folder / "output"
    write_sparse_checkpoint(source, document)
    plan = plan_conversion(source, Recipe(), max_shard_bytes=_SHARD_BYTES)
    arguments = ("convert", str(source), str(output), "--no-text", "--json")
    command = (sys.executable, "-m", "kimi_convert", *arguments)
    result_path = folder / "result.json"
    with result_path.open("wb") as result_file:
        process = subprocess.Popen(command, stdout=result_file)  # noqa: S603  (our own program)
        peak_bytes = wait_for_peak(process)
    if process.returncode:
        raise VerificationError(
            "the conversion that was to be measured failed",
            where=folder,
            expected="exit code 0",
            found=process.returncode,
        )
    return ConvertMemory(
        read_bytes=plan.read_bytes,
        written_bytes=plan.write_bytes,
        planned_peak_bytes=plan.peak_memory_bytes,
        peak_bytes=peak_bytes,
        seconds=json.loads(result_path.read_bytes())["seconds"],
    )


def write_sparse_checkpoint(folder: Path, document: Mapping[str, object]) -> None:
    """Write a checkpoint whose headers are real and whose weights are holes, read as zeros.

    Raises:
        ConfigError: the config is not valid.
    """
    plan = plan_shards(
        (
            PlannedTensor(
                entry.name, "F32" if entry.storage is Storage.FP32 else "BF16", entry.shape
            )
            for entry in expected_entries(parse_config(document))
        ),
        _SHARD_BYTES,
    )
    folder.mkdir()
    for shard in plan.shards:
        with (folder / shard.file_name).open("xb") as file:
            file.write(shard.header())
            file.truncate(shard.file_bytes)
    (folder / INDEX_FILE).write_bytes(plan.index_json())
    (folder / CONFIG_FILE).write_text(json.dumps(dict(document)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_convert.bench.convert_memory",
        description="Measure memory and speed of `convert` on a checkpoint of Moonlight's shape.",
    )
    parser.add_argument("--folder", type=Path, help="where 32 GB are free; default: temporary")
    parser.add_argument("--layers", type=int, default=MOONLIGHT["num_hidden_layers"])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    document = {**MOONLIGHT, "num_hidden_layers": options.layers}
    try:
        with tempfile.TemporaryDirectory(prefix="convert-memory-", dir=options.folder) as folder:
            measured = measure_conversion(Path(folder), document)
    except OSError as error:
        sys.stderr.write(f"error: cannot measure in {options.folder}: {error.strerror}\n")
        return ResourceError.exit_code
    except KimiConvertError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(json.dumps(measured.to_json()) if options.json else _text(measured))
    sys.stdout.write("\n")
    return 0


def wait_for_peak(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; return the peak of its resident set in bytes."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * _RSS_UNIT_BYTES


def _text(measured: ConvertMemory) -> str:
    return (
        f"{measured.read_bytes / 1e9:.1f} GB read, {measured.written_bytes / 1e9:.1f} GB written"
        f" in {measured.seconds:.1f} s ({measured.megabytes_per_second:.0f} MB/s)\n"
        f"peak memory {measured.peak_bytes / 1e6:.0f} MB,"
        f" of which tensors at most {measured.planned_peak_bytes / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
