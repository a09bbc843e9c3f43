"""Searches of several layers beside each other, while the teacher's pass goes on.

A search is many small products, which one thread runs almost as fast as several; two layers with a
thread each take half the time. Nothing passes between layers, so the results are those of one
layer after another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

_MOST_LAYERS = 4  # each holds a layer of the teacher
_MOST_BYTES = 4 * 1024**3  # of what the searches hold together

Told = Callable[[int, int], None]  # what is done, of how much
Search = Callable[[Told], None]


class StoppedError(Exception):
    """Ends a search whose result nobody waits for any more."""


def layers_ahead(device: torch.device, *, search_bytes: int) -> int:
    """Return how many layers are searched at a time.

    Args:
        device: a GPU takes one, with all its tokens; a CPU one for each thread.
        search_bytes: what one search holds.
    """
    if device.type != "cpu":
        return 1
    fitting = _MOST_BYTES // max(search_bytes, 1)
    return max(1, min(torch.get_num_threads(), _MOST_LAYERS, fitting))


class SearchPool:
    """Runs searches in threads of its own. A context manager: leaving it ends what still runs."""

    def __init__(self, width: int, *, on_progress: Callable[[float], None]) -> None:
        """Prepare.

        Args:
            width: searches at a time, at least 1; torch's threads are shared out among them.
            on_progress: told how many layers are done, parts included; from any thread, one call
                at a time.
        """
        self.width = width
        self._on_progress = on_progress
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(width, initializer=self._share_threads)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._done: dict[int, float] = {}

    def start(self, layer_idx: int, search: Search) -> Future[None]:
        """Queue one layer's search; its `told` says how far it is."""
        return self._pool.submit(self._run, layer_idx, search)

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the searches; after an error, for them to stop at their next step."""
        if kind is not None:
            self._stopped.set()
        self._pool.shutdown(cancel_futures=kind is not None)
        torch.set_num_threads(self._threads)

    def _share_threads(self) -> None:
        if self.width > 1:
            torch.set_num_threads(max(1, self._threads // self.width))

    def _run(self, layer_idx: int, search: Search) -> None:
        def told(done: int, total: int) -> None:
            if self._stopped.is_set():
                raise StoppedError
            self._tell(layer_idx, done / max(total, 1))

        with torch.no_grad():  # a setting of each thread
            told(0, 1)
            search(told)
            self._tell(layer_idx, 1.0)

    def _tell(self, layer_idx: int, share: float) -> None:
        with self._lock:
            self._done[layer_idx] = share
            self._on_progress(sum(self._done.values()))
