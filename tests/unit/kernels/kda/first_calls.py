"""First calls of `chunk_kda` and what Triton compiles for them: a program for test_first_call.py.

Reads scenarios as JSON; prints the kernels that every call compiles ahead (in other threads), late
(in its own) and, without a GPU, launches. Without one, one is pretended: it says that it is a Hopper,
and neither compiles nor launches, but notes what it is asked to. A program of its own, since the
tests' process may have chosen the interpreter.
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import dataclass

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from kimi_convert.kernels.backend import Backend
from kimi_convert.kernels.kda import Gate, ahead
from kimi_convert.kernels.kda.arguments import Options, check_arguments
from kimi_convert.kernels.kda.chunk_gpu import chunk_kda_gpu
from kimi_convert.kernels.kda.gradients import kda_key_gradients_kernel
from kimi_convert.kernels.kda.intra import kda_intra_kernel
from kimi_convert.kernels.kda.scan import kda_scan_kernel
from kimi_convert.kernels.kda.scan_backward import kda_scan_backward_kernel
from kimi_convert.kernels.kda.value_gradients import kda_value_gradients_kernel

KERNELS = (
    kda_intra_kernel,
    kda_scan_kernel,
    kda_scan_backward_kernel,
    kda_value_gradients_kernel,
    kda_key_gradients_kernel,
)


class Hopper(DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError


class Journal:
    """What is compiled and launched since the last call began."""

    def __init__(self):
        self.fails_in_threads = False
        self.clear()

    def clear(self):
        self.ahead, self.late, self.launched = [], [], []

    def compile(self, src, target=None, options=None, _env_vars=None):
        """Stand for Triton's compiler."""
        if self.fails_in_threads and in_thread():
            raise RuntimeError("no memory left for a thread")
        form = sorted(
            map(str, (*src.signature.items(), *src.constants.items(), *src.attrs.items()))
        )
        form = " ".join((src.fn.__name__, *form))
        self.note(form)
        return Compiled(self, form)

    def listen(self, *, metadata, **_):
        """Listen to Triton's compiler."""
        if metadata["name"].startswith("kda_"):
            self.note(metadata["name"])

    def note(self, form):
        (self.ahead if in_thread() else self.late).append(form)


def in_thread():
    return threading.current_thread().name.startswith("compile-kda")


@dataclass
class Compiled:
    """A kernel that runs nothing."""

    journal: Journal
    form: str
    function: int = 0
    packed_metadata: tuple = ()

    def launch_metadata(self, grid, stream, *args):
        return None

    def run(self, *args):
        self.journal.launched.append(self.form)


def call(
    *, dtype="float16", T=1024, B=1, H=2, HV=None, K=64, V=64, gate="softplus", g_dtype="float32",
    beta_dtype="float32", packed=None, state=False, gradients=False, final=False, backend="triton",
):  # fmt: skip
    """Make a call, and its backward pass if it has one."""
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    HV = HV or H
    made = [(H, K), (H, K), (HV, V), (HV, K), (HV,)]
    q, k, v, g, beta = (torch.zeros(B, T, *shape, dtype=getattr(torch, dtype)) for shape in made)
    g, beta = g.to(getattr(torch, g_dtype)), beta.to(getattr(torch, beta_dtype))
    bounds = None if packed is None else torch.tensor(packed)
    N = B if packed is None else len(packed) - 1
    inputs = [x.requires_grad_(gradients) for x in (q, k, v, g, beta)]
    law = Gate(
        A_log=torch.zeros(HV),
        dt_bias=torch.zeros(HV, K),
        lower_bound=-5.0 if gate == "bounded" else None,
    )
    options = Options(
        scale=None,
        initial_state=torch.zeros(N, HV, K, V) if state else None,
        gate=None if gate is None else law,
        qk_norm=gate is not None,
        beta_logits=gate is not None,
        cu_seqlens=bounds,
    )
    checked = check_arguments("chunk_kda", *inputs, options)
    output, last = chunk_kda_gpu(checked, backend and Backend(backend))
    if gradients:
        torch.autograd.backward([output, last] if final else [output], [output, last][: 1 + final])


def run(journal, scenario):
    """Return what each call of a scenario compiles and launches, from empty caches on."""
    for kernel in KERNELS:
        kernel.device_caches.clear()
    ahead._compiled.clear()
    journal.fails_in_threads = scenario.get("fails", False)
    can_compile_ahead = ahead._CAN_COMPILE_AHEAD
    ahead._CAN_COMPILE_AHEAD = can_compile_ahead and not scenario.get("old", False)
    found = []
    for options in scenario["calls"]:
        journal.clear()
        call(**options)
        lists = {name: getattr(journal, name) for name in ("ahead", "late", "launched")}
        threads = [thread.name for thread in threading.enumerate()]
        found.append({**lists, "threads": [x for x in threads if x.startswith("compile-kda")]})
    ahead._CAN_COMPILE_AHEAD = can_compile_ahead
    return found


def main():
    journal = Journal()
    if torch.cuda.is_available():
        triton.knobs.compilation.listener = journal.listen
    else:
        triton.runtime.driver.set_active(Hopper())
        triton.compiler.compile = journal.compile
    scenarios = json.load(sys.stdin)
    json.dump({name: run(journal, of) for name, of in scenarios.items()}, sys.stdout)


if __name__ == "__main__":
    main()
