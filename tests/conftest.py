"""What every test runs under: no network, few threads, known seeds, the same examples each time.

Tests that need a GPU or the network are left out unless they are asked for (`-m gpu`); the end of
the run says how many GPU tests that were.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import settings

# Most tensors here are too small for a second thread: on two busy cores the tests of models, kernels
# and oracles took 33 to 38 s with one thread, 58 to 417 s with two.
torch.set_num_threads(1)

# The same examples each time: a failure belongs to a change, not to chance. To look for new ones:
# --hypothesis-profile=explore. No deadline: a busy machine is not a failure.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("repeatable")

GPU_LEFT_OUT = pytest.StashKey[int]()


def pytest_configure(config):
    config.stash[GPU_LEFT_OUT] = 0
    # Read when a kernel's module is imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # A test that reaches for the Hub by mistake fails at once.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_deselected(items):
    for item in items:
        item.config.stash[GPU_LEFT_OUT] += needs_gpu(item)


def pytest_runtest_setup(item):
    if needs_gpu(item) and not torch.cuda.is_available():
        item.config.stash[GPU_LEFT_OUT] += 1
        pytest.skip("no CUDA device")


def pytest_sessionfinish(session):
    """Tell the process that reports, where pytest-xdist has made this one for a part of the tests."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["gpu_left_out"] = session.config.stash[GPU_LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    # Each process collects, and leaves out, all tests.
    told = getattr(node, "workeroutput", {}).get("gpu_left_out", 0)
    node.config.stash[GPU_LEFT_OUT] = max(node.config.stash[GPU_LEFT_OUT], told)


def pytest_terminal_summary(terminalreporter, config):
    left_out = config.stash[GPU_LEFT_OUT]
    if left_out:
        terminalreporter.write_line(f"{left_out} GPU tests did not run: they need CUDA and -m gpu")


def needs_gpu(item):
    return item.get_closest_marker("gpu") is not None


@pytest.fixture(autouse=True)
def known_seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fitted_example(tmp_path_factory):
    """Made once for all tests that only read it: a fit takes a while."""
    from tests.integration.fitted_example import fit_example

    return fit_example(tmp_path_factory.mktemp("fitted"))
