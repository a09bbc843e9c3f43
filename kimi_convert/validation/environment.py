"""What computes the numbers of a report: versions, system, threads, GPUs."""

from __future__ import annotations

import platform

import torch

from kimi_convert import __version__
from kimi_convert.validation.report import Environment


def this_environment() -> Environment:
    """Look at this process."""
    return Environment(
        kimi_convert=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        system=platform.platform(),
        threads=torch.get_num_threads(),
        gpus=tuple(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))),
    )
