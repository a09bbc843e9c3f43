"""How much memory one task of a conversion holds, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kimi_convert.checkpoints.dtypes import DTYPES
from kimi_convert.checkpoints.weight_reader import decoding_bytes, quantizing_bytes
from kimi_convert.checkpoints.weights import Weight
from kimi_convert.conversion.rules import Op
from kimi_convert.conversion.tasks import TensorTask

_FP32_BYTES = 4


def task_bytes(task: TensorTask, weights: Mapping[str, Weight]) -> int:
    """Return the bytes of one task's tensors, at the worst of its moments.

    Sources are read and widened one after the other; then a transform makes its result; then the
    sources are let go, and the result is narrowed.
    """
    sources = [weights[name] for name in task.sources]
    if task.op in (Op.COPY, Op.DEQUANTIZE):
        return decoding_bytes(sources[0])
    if task.op is Op.QUANTIZE:
        return quantizing_bytes(sources[0])
    made = math.prod(task.tensor.shape)
    narrowing = made * (_FP32_BYTES + DTYPES[task.tensor.dtype].width_bytes)
    if task.op is Op.FITTED:
        return narrowing
    sizes = [math.prod(weight.shape) for weight in sources]
    wide = sum(sizes) * _FP32_BYTES
    reading = max(map(decoding_bytes, sources), default=0)
    # The power of a folded matrix holds its rows, scaled, and two products of their size; a fold
    # its rows and those scaled; an output is not folded, and is scaled where it is. Random numbers
    # are drawn, then scaled.
    if task.op is Op.SCALE_OUTPUT:
        making = 4 * max(sizes[1:])
    elif task.op in (Op.FOLD_QUERY, Op.FOLD_KEY, Op.FOLD_VALUE):
        making = 2 * max(sizes) + made
    else:
        making = 4 * max(sizes, default=made // 4) + made
    return max(wide + max(reading, making * _FP32_BYTES), narrowing)
