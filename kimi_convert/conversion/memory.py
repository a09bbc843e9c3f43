"""How much memory a conversion takes and how much is free, before the first byte is written."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

from kimi_convert.checkpoints.messages import sized
from kimi_convert.conversion.plan import ConversionPlan
from kimi_convert.conversion.tasks import TensorTask
from kimi_convert.errors import ResourceError

# Python, torch and their libraries, and what is read, hashed and written at once: 0.35 to 0.46 GB
# measured.
PROCESS_BYTES = 480 * 10**6
_M_ARENA_MAX = -8  # of malloc.h
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # version 2; where there is none, the machine's memory counts


def memory_bytes(plan: ConversionPlan, tasks: Iterable[TensorTask]) -> int:
    """Return the bytes that one process holds at once for these tasks, at most: program and tensors."""
    return PROCESS_BYTES + plan.working_bytes(tasks)


def require_memory(plan: ConversionPlan, *, workers: int) -> None:
    """Check that there is memory for a conversion.

    Raises:
        ResourceError: less is free than the plan says is needed.
    """
    require_free_memory(
        workers * memory_bytes(plan, plan.tasks),
        what="the conversion",
        where=plan.source,
        of=f" for {workers} at a time",
        hint="Use fewer --jobs, or a machine with more memory.",
    )


def require_free_memory(
    needed: int,
    *,
    what: str,
    where: Path,
    of: str = "",
    hint: str = "Use a machine with more memory.",
) -> None:
    """Check that there is memory for `what`, before it begins.

    Raises:
        ResourceError: fewer than `needed` bytes are free.
    """
    free = free_memory_bytes()
    if free is not None and free < needed:
        raise ResourceError(
            f"not enough memory for {what}",
            where=where,
            expected=f"{sized(needed)}{of}",
            found=f"{sized(free)} free",
            hint=hint,
        )


def use_one_heap() -> None:
    """Let all threads of this process allocate from one heap, before the first of them begins.

    By default each has its own, and keeps there what it has freed: 0.2 GB of a large conversion.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    except (OSError, AttributeError):  # not the GNU C library: nothing to set
        return


def free_memory_bytes() -> int | None:
    """Return what programs may still take, or None where the system does not tell."""
    return min((free for free in (_system(), _container()) if free is not None), default=None)


def _system() -> int | None:
    kilobytes = _numbers(_MEMINFO, separator=":").get("MemAvailable")
    return None if kilobytes is None else kilobytes * 1024


def _container() -> int | None:
    """Return what a container may still take; pages of files that it can give back count as free."""
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" is no limit
        return None
    cached = _numbers(_CGROUP / "memory.stat", separator=" ").get("inactive_file", 0)
    return max(0, limit - used + cached)


def _numbers(path: Path, *, separator: str) -> dict[str, int]:
    """Read lines of a name, a separator and a number."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(separator) for line in lines)
    return {name: int(rest.split()[0]) for name, _, rest in pairs if rest.strip()[:1].isdigit()}
