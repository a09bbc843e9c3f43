"""The example checkpoint and texts that come with the package, as paths.

They lie in the package when it was installed from a wheel, and beside it in a checkout.
"""

from __future__ import annotations

from pathlib import Path

from kimi_convert.errors import InputError

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "_examples", _PACKAGE.parent / "examples")


def example_checkpoint() -> Path:
    """Return the folder of Moonlet-7M, a small trained MLA checkpoint in DeepSeek-V3 format.

    Raises:
        InputError: the installation lacks it.
    """
    return _find("moonlet-7m")


def calibration_text() -> Path:
    """Return the text to calibrate on: one `{"kind", "text"}` document a line.

    Never evaluate on it: the example checkpoint was trained on it.

    Raises:
        InputError: the installation lacks it.
    """
    return _find("text/calibration.jsonl")


def heldout_text() -> Path:
    """Return the text to evaluate on, in the same form; no part of it was trained on.

    Raises:
        InputError: the installation lacks it.
    """
    return _find("text/heldout.jsonl")


def _find(name: str) -> Path:
    places = [folder / name for folder in _FOLDERS]
    for place in places:
        if place.exists():
            return place
    raise InputError(
        "the examples are not part of this installation",
        expected=" or ".join(map(str, places)),
        hint="Install the wheel of kimi-convert, or a whole checkout with `pip install -e .`.",
    )
