"""What can be made to go wrong, and the record of what was asked and sent."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches."""

    pattern: str
    times: int = 1
    status: int | None = None  # answer with this instead
    headers: dict[str, str] = field(default_factory=dict)  # of that answer
    body: bytes | None = None  # answer with this, as HTML
    redirect: str = ""  # to this host, as http://localhost:1234
    cut: int | None = None  # close the connection after so many bytes of the body
    flip: int | None = None  # change the byte of the file at this offset
    whole: bool = False  # do not know ranges: send all of the file
    hang: threading.Event | None = None  # after the cut, wait for this before closing


@dataclass
class Request:
    """One request, as it was logged."""

    method: str
    path: str
    range: str
    authorization: str
    sent: int = 0  # bytes of a file's body


class Faults:
    """Faults that are still to happen, in the order in which they were added."""

    def __init__(self) -> None:
        self.clear()
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        self._waiting.append(fault)

    def clear(self) -> None:
        self._waiting: list[Fault] = []
        self.list_page = 1000  # entries on a page of a list
        self.lists_go_on_at = ""  # another host, for the pages after the first

    def take(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self._waiting:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None
