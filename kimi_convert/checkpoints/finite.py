"""Find NaN and Inf in stored values, as fast as memory can be read. Imports torch."""

from __future__ import annotations

import torch

from kimi_convert.checkpoints.dtypes import torch_dtype

# Values of other dtypes cannot be NaN or Inf, or are no weights.
FLOATS = ("F8_E4M3", "BF16", "F16", "F32", "F64")

_E4M3_NAN = 0x7F  # without its sign; there is no Inf


def find_non_finite(chunk: memoryview, dtype: str) -> tuple[int, int, int] | None:
    """Search stored values for NaN and Inf.

    Args:
        chunk: little-endian values, a whole number of them; writable.
        dtype: safetensors name of a float.

    Returns:
        None if all are finite, else the number of NaN, the number of Inf, and the place of the
        first of either.
    """
    if not chunk.nbytes:
        return None
    if dtype == "F8_E4M3":
        return _find_nan_in_fp8(torch.frombuffer(chunk, dtype=torch.int8))
    values = torch.frombuffer(chunk, dtype=torch_dtype(dtype))
    # NaN spreads to both. One core: 22 GB/s in bf16, where isfinite().all() takes 0.8 GB/s.
    low, high = values.aminmax()
    if low.isfinite() and high.isfinite():
        return None
    first = int((~values.isfinite()).nonzero()[0])
    return int(values.isnan().sum()), int(values.isinf().sum()), first


def _find_nan_in_fp8(stored: torch.Tensor) -> tuple[int, int, int] | None:
    sizes = stored.bitwise_and(_E4M3_NAN)
    if int(sizes.amax()) != _E4M3_NAN:
        return None
    places = (sizes == _E4M3_NAN).nonzero()
    return len(places), 0, int(places[0])
