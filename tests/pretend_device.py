"""A device that is not there: tensors say they are on it, and meet none of the CPU's.

Code that leaves a tensor on the CPU fails here as it does on a GPU, on a machine that has none. Values
are computed on the CPU. What a GPU forgives is forgiven: single numbers, and indices of other tensors.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

# A type that torch knows, has no kernels for, and whose gradients it computes in the calling thread.
DEVICE = torch.device("lazy", 0)
_ANY_INDEX = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default}
_ANY_INDEX |= {torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default}
_MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class Elsewhere(torch.Tensor):
    """A tensor of the CPU's that says it is on the device."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    held: torch.Tensor

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_device():
    """Make the device usable in this thread."""
    with _Mode():
        yield DEVICE


def _run(func, args, kwargs):
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    tensors = []
    _mapped(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, [*args, kwargs])
    here = [isinstance(x, Elsewhere) for x in tensors]
    if func not in _MOVES | _ANY_INDEX:
        strangers = [
            x for x, is_here in zip(tensors, here, strict=True) if not is_here and x.dim()
        ]
        if any(here) and strangers:
            raise AssertionError(f"{func} of {DEVICE} and {strangers[0].device}")
    if wanted is not None and wanted.type == DEVICE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*_mapped(_held, args), **_mapped(_held, kwargs))
    if func in _ANY_INDEX:
        stays = isinstance(args[0], Elsewhere)
    elif wanted is not None:
        stays = wanted.type == DEVICE.type
    else:
        stays = any(here) if func is not torch.ops.aten.copy_.default else here[0]
    if not stays:
        return result
    wrapped = _mapped(_put, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _held(x):
    return x.held if isinstance(x, Elsewhere) else x


def _put(x):
    return Elsewhere(x) if isinstance(x, torch.Tensor) else x


def _mapped(function, tree):
    """Apply a function to every leaf; `tree_map` of torch takes three times as long."""
    if isinstance(tree, (tuple, list)):
        return type(tree)([_mapped(function, x) for x in tree])
    if isinstance(tree, dict):
        return {name: _mapped(function, x) for name, x in tree.items()}
    return function(tree)
