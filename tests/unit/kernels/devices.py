"""Where Triton kernels are tested: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# tl.dot of bf16 operands is wrong in the interpreter.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
