# Kernels are programs of another language in Python's syntax: a type checker has nothing to say.
from typing import Any

jit: Any

def __getattr__(name: str) -> Any: ...
