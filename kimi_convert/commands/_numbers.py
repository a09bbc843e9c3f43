"""How sizes, counts, times and measured numbers read. JSON documents hold the plain numbers."""

from __future__ import annotations

_BYTE_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
_COUNT_UNITS = ("", "K", "M", "B", "T")


def bytes_text(nbytes: int) -> str:
    """Return a size in decimal units, as disks are sold: "12.7 MB"."""
    scaled, power = _scaled(nbytes, last=len(_BYTE_UNITS) - 1)
    return f"{scaled} {_BYTE_UNITS[power]}"


def count_text(count: int) -> str:
    """Return a number of parameters as papers write it: "16.4B"."""
    scaled, power = _scaled(count, last=len(_COUNT_UNITS) - 1)
    return f"{scaled}{_COUNT_UNITS[power]}"


def seconds_text(seconds: float) -> str:
    """Return a duration with the precision that a reader needs: "0.84 s", "12 s", "3 min 5 s"."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def files_text(count: int) -> str:
    """Return a number of files: "1 file", "2 files"."""
    return f"{count} file" if count == 1 else f"{count} files"


def layers_text(layers: tuple[int, ...]) -> str:
    """Return increasing layer numbers with runs shortened: "0-2, 4"."""
    runs: list[list[int]] = []
    for layer_idx in layers:
        if runs and layer_idx == runs[-1][-1] + 1:
            runs[-1].append(layer_idx)
        else:
            runs.append([layer_idx])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _scaled(number: int, *, last: int) -> tuple[str, int]:
    power = 0
    # 999.95 would round to "1000.0": go to the next unit before.
    while power < last and number >= 999.95 * 1000**power and number >= 1000:
        power += 1
    return (f"{number / 1000**power:.1f}" if power else str(number)), power
