"""What holds files open, and lets go of them at the end of a `with` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Releasing(ABC):
    """A context manager that only releases: what went wrong inside is not its business."""

    @abstractmethod
    def release(self) -> None:
        """Close every file. Its pages leave memory once no tensor of it is held any more."""

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release everything."""
        self.release()
