"""One parameter set of flash-linear-attention's tests of KDA: what is drawn, called and allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple


class Form(StrEnum):
    """Which function is tested."""

    CHUNK = "chunk"
    RECURRENT = "recurrent"
    DECODE = "decode"  # one token of each sequence; FLA takes the states from a pool, we do not
    GATE = "gate"  # the gate's law alone


class Beta(StrEnum):
    """Who takes beta's sigmoid."""

    GIVEN = "given"  # it is drawn as a write strength
    INSIDE = "inside"  # the function, of logits
    OUTSIDE = "outside"  # the caller, of the same logits in fp32


class Shape(NamedTuple):
    """Sizes of a case."""

    B: int
    T: int
    H: int
    HV: int
    D: int  # of keys and values


@dataclass(frozen=True, slots=True)
class Allowed:
    """The largest root mean square error of each result, relative to its own; see `fla_cases`."""

    errors: Mapping[str, float]
    only_warned_of: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaCase:
    """One parameter set."""

    test: str  # FLA's name for it, without `test_`
    form: Form
    shape: Shape
    dtype: str
    scale: float | None = 1.0
    # q, k and v are normal, and k is of unit length without the function's norm; else all are
    # uniform in (0, 1), which makes keys alike.
    normal: bool = False
    normalizer: float = 1.0  # divides log decays that are drawn
    spread: float = 1.0  # of what the gate's law is drawn for
    # Shares of log decays that become 0, and of gate inputs that become -1000.
    zeroed: float = 0.0
    drowned: float = 0.0
    clamped: bool = False  # log decays to -5
    fused_gate: bool = False
    normal_rates: bool = False  # else log U(1, 16)
    has_rates: bool = True
    has_bias: bool = True
    lower_bound: float | None = None
    qk_norm: bool = False  # in the function; else before it
    beta: Beta = Beta.GIVEN
    doubled_beta: bool = False
    state_v_first: bool = False
    offsets: tuple[int, ...] = ()  # of packed sequences
    gradients: bool = False
    allowed: Allowed
    against_twin: float | None = None  # allowed between this and `twin`

    @property
    def name(self) -> str:
        """The test and what it varies."""
        B, T, H, HV, D = self.shape
        size = f"B={B} T={T}"
        if self.offsets:
            size = f"cu={','.join(map(str, self.offsets))}"
        if self.form is Form.DECODE:
            size = f"N={T}"
        marks = {
            "norm": self.qk_norm,
            "gate": self.fused_gate,
            "bounded": self.lower_bound is not None,
            "no A_log": self.fused_gate and not self.has_rates,
            "no dt_bias": self.fused_gate and not self.has_bias,
            "2 beta": self.doubled_beta,
            "-5": self.clamped,
            f"/{self.normalizer:g}": self.normalizer != 1,
            f"0: {self.zeroed:g}": self.zeroed > 0,
            f"-1000: {self.drowned:g}": self.drowned > 0,
        }
        words = f"{size} H={H},{HV} D={D} {self.dtype}"
        return " ".join([self.test, words, *(mark for mark, holds in marks.items() if holds)])

    @property
    def twin(self) -> FlaCase | None:
        """The same call said in another way, which must give the same."""
        if self.state_v_first:
            return replace(self, state_v_first=False)
        if self.beta is Beta.INSIDE:
            return replace(self, beta=Beta.OUTSIDE)
        return None
