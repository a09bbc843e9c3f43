"""Write one file of weights of each kind of a large conversion, and delete it at once.

Files are of one kind where the same operations make tensors of the same shapes. A program of its
own, so that its memory can be measured: `python -m kimi_convert.bench.sampled_conversion SOURCE OUT`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from kimi_convert.config.recipe import Recipe
from kimi_convert.conversion.memory import use_one_heap
from kimi_convert.conversion.plan import plan_conversion
from kimi_convert.conversion.shard_job import ShardJob, shard_jobs, write_shard

_SHARD_BYTES = 10**9


def write_sample(source: Path, output: Path) -> dict[str, object]:
    """Write the fewest files that cover every operation on every shape; return what was done."""
    use_one_heap()
    plan = plan_conversion(source, Recipe(), max_shard_bytes=_SHARD_BYTES)
    output.mkdir()
    jobs = _covering(shard_jobs(plan, None, output.joinpath))
    started = time.monotonic()
    for job in jobs:
        write_shard(job)
        job.path.unlink()
    return {
        "files": len(jobs),
        "of_files": len(plan.shards.shards),
        "written_bytes": sum(job.shard.file_bytes for job in jobs),
        "seconds": time.monotonic() - started,
        "planned_peak_bytes": max(job.memory_bytes for job in jobs),
    }


def _covering(jobs: tuple[ShardJob, ...]) -> list[ShardJob]:
    """Take each job that has an operation on a shape which no job before it had."""
    seen: set[tuple[object, ...]] = set()
    chosen: list[ShardJob] = []
    for job in jobs:
        kinds = {
            (task.op, task.tensor.shape, *(job.weights[name].shape for name in task.sources))
            for task in job.tasks
        }
        if not kinds <= seen:
            chosen.append(job)
        seen |= kinds
    return chosen


if __name__ == "__main__":
    sys.stdout.write(json.dumps(write_sample(Path(sys.argv[1]), Path(sys.argv[2]))))
