"""conversion.json: where every tensor of a converted checkpoint came from, and its hashes.

No times and no absolute paths: the same conversion on the same kind of machine gives the same
bytes; a fit also needs the same number of threads for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from kimi_convert import __version__
from kimi_convert.checkpoints.hashing import sha256_of_file
from kimi_convert.checkpoints.origin import declared_license, read_origin
from kimi_convert.checkpoints.written import WrittenFile, WrittenShard, tensor_hashes
from kimi_convert.config.huggingface import CONFIG_FILE
from kimi_convert.conversion.plan import ConversionPlan
from kimi_convert.model.tokenizer import tokenizer_files

CONVERSION_FILE = "conversion.json"
FORMAT = 2

# Beside the tokenizer's own files: data and terms, never code.
_ALSO_CARRIED = ("generation_config.json", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")

SourceHashes = Mapping[str, str]  # source tensor -> SHA-256 of its bytes, in hex


def carried_files(source: Path) -> tuple[str, ...]:
    """Return the names of the small files that a conversion carries over unchanged."""
    also = tuple(name for name in _ALSO_CARRIED if (source / name).is_file())
    return (*tokenizer_files(source), *also)


def provenance(
    plan: ConversionPlan,
    files: Iterable[WrittenFile | WrittenShard],
    copied: SourceHashes,
    calibration: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return the content of conversion.json.

    Args:
        plan: what was carried out.
        files: everything written but conversion.json itself.
        copied: the source tensors that were carried over bit for bit, with their hashes.
        calibration: what the fit reports; None for a conversion without text.
    """
    written = list(files)
    hashes = tensor_hashes(written)
    return {
        "format": FORMAT,
        "tool": {"name": "kimi-convert", "version": __version__},
        "source": _source(plan),
        "recipe": plan.recipe.to_json(),
        **({} if calibration is None else {"calibration": dict(calibration)}),
        "layers": {
            "kda": list(plan.target_config.kda_layers),
            "mla": list(plan.target_config.mla_layers),
        },
        "runtimes": [support.to_json() for support in plan.runtimes],
        "files": {file.name: file.to_json() for file in written},
        "tensors": {
            task.tensor.name: {
                "op": str(task.op),
                "sources": plan.stored_sources(task),
                "sha256": hashes[task.tensor.name],
            }
            for task in plan.tasks
        },
        "copied_source_sha256": dict(copied),
        "dropped": [{"name": one.name, "why": one.why} for one in plan.dropped],
    }


def _source(plan: ConversionPlan) -> dict[str, object]:
    index = plan.index
    origin, terms = read_origin(index.folder), declared_license(index.folder)
    name = origin.repository.rpartition("/")[2] if origin else index.folder.resolve().name
    return {
        "name": name,
        **({"repository": origin.repository, "commit": origin.commit} if origin else {}),
        **({"license": terms} if terms else {}),
        "model_type": plan.source_config.model_type,
        "config_sha256": sha256_of_file(index.folder / CONFIG_FILE),
        "tensors": len(index.tensors),
        "nbytes": index.nbytes,
        "files": {name: file.nbytes for name, file in sorted(index.shards.items())},
    }
