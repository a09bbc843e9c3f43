"""How two implementations are compared: one number, one bound."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from tests.unit.model.build import relative_error

__all__ = ["FP32_BOUND", "load_theirs", "random_tokens", "relative_error"]

# fp32 rounds at 6e-8. Four layers of sums over some hundred terms, in another order, give about
# 3e-6 of the largest logit; an error in the maths gives more than 1e-3.
FP32_BOUND = 1e-5


def random_tokens(vocab_size: int, batch_size: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(vocab_size, (batch_size, length), generator=generator)


def load_theirs(model_class: type, folder: Path, dtype: torch.dtype = torch.float32):
    """Load a transformers model, and require that it used every tensor and missed none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within their own code
        model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["unexpected_keys"]
    # A model without shared experts has them with no rows there.
    parameters = dict(model.named_parameters())
    assert not [name for name in info["missing_keys"] if parameters[name].numel()]
    return model.eval()
