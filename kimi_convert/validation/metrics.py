"""The formulas of validation, on tensors alone: losses, divergences, relative errors.

Logarithms are natural, so losses and divergences are in nats. No file, no model, no report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch


def token_loss(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -log p(target) of each token, [N] fp64, in nats.

    Args:
        log_probs: [N, vocab], log-softmax of the logits.
        targets: [N] int64.
    """
    return -log_probs.gather(-1, targets[:, None])[:, 0].double()


def forward_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) = sum p_t (log p_t - log p_s) of each token, [N] fp64, nats.

    Args:
        teacher: [N, vocab], log-softmax of the logits.
        student: the same of the student.
    """
    return (teacher.exp() * (teacher - student)).sum(-1, dtype=torch.float64)


def top1_agreement(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Tell for each token whether both rows [N, vocab] are largest at the same place, [N] bool."""
    return teacher.argmax(-1) == student.argmax(-1)


def perplexity(loss: float) -> float:
    """Return exp(loss in nats), infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def token_slices(num_tokens: int, *, vocab_size: int, max_bytes: int) -> Iterator[slice]:
    """Cut tokens into runs whose fp32 logits [run, vocab] take at most `max_bytes` bytes.

    One token is always taken, however large the vocabulary is.
    """
    step = max(1, max_bytes // (4 * vocab_size))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


class RelativeSquaredError:
    """The sum of |found - expected|^2 over the sum of |expected|^2, added up in fp64."""

    def __init__(self) -> None:
        """Start with no values."""
        self._error = 0.0
        self._size = 0.0

    def add(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Take two tensors of the same shape into the sums."""
        self._error += _squares(found - expected)
        self._size += _squares(expected)

    @property
    def value(self) -> float:
        """0 if all values were equal, 1 if `found` was zero; infinite where only that was."""
        if self._size == 0:
            return 0.0 if self._error == 0 else math.inf
        return self._error / self._size


class Alignment:
    """The angle between two outputs and the ratio of their lengths, over all values at once."""

    def __init__(self) -> None:
        """Start with no values."""
        self._product = 0.0
        self._found = 0.0
        self._expected = 0.0

    def add(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Take two tensors of the same shape into the sums."""
        wide = torch.promote_types(found.dtype, torch.float32)
        product = found.to(wide) * expected.to(wide)
        self._product += product.sum(dtype=torch.float64).item()
        self._found += _squares(found)
        self._expected += _squares(expected)

    @property
    def cosine(self) -> float:
        """Of the angle; 0 if either is zero."""
        lengths = math.sqrt(self._found * self._expected)
        return self._product / lengths if lengths else 0.0

    @property
    def norm_ratio(self) -> float:
        """The length found over the one expected; infinite where only the latter is zero."""
        if self._expected == 0:
            return 0.0 if self._found == 0 else math.inf
        return math.sqrt(self._found / self._expected)


class MaxRelativeError:
    """The largest |found - expected| over the largest |expected|; NaN if any value is NaN."""

    def __init__(self) -> None:
        """Start with no values."""
        self._error = torch.zeros(())
        self._size = torch.zeros(())

    def add(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Take two tensors of the same shape into the maxima."""
        # torch.maximum, unlike Python's max, keeps a NaN whichever side it is on.
        self._error = torch.maximum(self._error, (found - expected).abs().max().cpu())
        self._size = torch.maximum(self._size, expected.abs().max().cpu())

    @property
    def value(self) -> float:
        """0 if all values were equal."""
        error, size = self._error.item(), self._size.item()
        if size == 0:
            return 0.0 if error == 0 else math.inf
        return error / size


def _squares(values: torch.Tensor) -> float:
    # In fp32 at least before squaring: fp16 would overflow above 255.
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.square().sum(dtype=torch.float64).item()
