"""Run a generator on another thread, a little ahead of who takes its items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from threading import Condition, Thread
from typing import Generic, TypeVar

_HELD_BYTES = 32 * 1024 * 1024  # so that there is work while a large tensor is computed

Item = TypeVar("Item")


def ahead(
    items: Generator[Item], *, nbytes: Callable[[Item], int], held_bytes: int = _HELD_BYTES
) -> Generator[Item]:
    """Give the items of a generator that runs on a thread of its own.

    Closing what is returned ends the generator after the item that it is making.

    Args:
        items: runs on that thread alone, its `finally` clauses included. What it raises is raised
            here, after the items before.
        nbytes: the size of an item.
        held_bytes: nothing is made while what was made and is not done with is larger; so one
            that is larger alone is done with before the next is begun.
    """
    maker = _Maker(items, nbytes, held_bytes)
    thread = Thread(target=maker.run, name="ahead", daemon=True)
    thread.start()
    try:
        yield from maker.taken()
    finally:
        maker.stop()
        thread.join()


class _Maker(Generic[Item]):
    """What the two threads share."""

    def __init__(
        self, items: Generator[Item], nbytes: Callable[[Item], int], held_bytes: int
    ) -> None:
        self._items = items
        self._nbytes = nbytes
        self._most_bytes = held_bytes
        self._changed = Condition()
        self._made: deque[Item] = deque()
        self._held_bytes = 0
        self._ended = False
        self._stopped = False
        self._error: BaseException | None = None

    def run(self) -> None:
        """Make items until there are no more or nobody wants them."""
        try:
            with closing(self._items):
                for item in self._items:
                    if not self._hand_over(item):
                        break
                    del item  # held no longer than who takes it holds it
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _hand_over(self, item: Item) -> bool:
        """Leave an item to be taken; tell, once there is room, whether another one is wanted."""
        with self._changed:
            self._made.append(item)
            self._held_bytes += self._nbytes(item)
            self._changed.notify_all()
            del item
            self._changed.wait_for(self._has_room)
            return not self._stopped

    def _has_room(self) -> bool:
        return self._stopped or self._held_bytes <= self._most_bytes

    def taken(self) -> Generator[Item]:
        """Give the items."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._made or self._ended)
                if not self._made:
                    break
                item = self._made.popleft()
            size = self._nbytes(item)
            yield item
            del item
            with self._changed:
                self._held_bytes -= size
                self._changed.notify_all()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Want no more items."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
