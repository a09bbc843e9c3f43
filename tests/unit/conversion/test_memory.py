"""What a conversion does so that it holds no more than it says."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# Prints what the C library says of its heaps, after a thread has allocated.
HEAPS = """
import ctypes, sys, threading
if "one" in sys.argv:
    from kimi_convert.conversion.memory import use_one_heap
    use_one_heap()
thread = threading.Thread(target=lambda: bytearray(10_000))
thread.start()
thread.join()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="of the GNU C library")
def test_threads_allocate_from_one_heap_where_it_is_asked_for():
    def heaps(*arguments):
        run = subprocess.run(
            [sys.executable, "-c", HEAPS, *arguments], check=True, capture_output=True, timeout=60
        )
        return run.stdout.count(b"<heap nr=")

    assert heaps("one") == 1
    assert heaps() > 1
