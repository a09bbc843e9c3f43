"""The arguments of the KDA functions: checked once, then read by every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_convert.errors import KernelInputError
from kimi_convert.kernels.checks import expect, expect_dtype, expect_precision
from kimi_convert.kernels.kda.gate import Gate
from kimi_convert.kernels.norm import l2_norm
from kimi_convert.kernels.packing import check_packed

_UP_TO_SINGLE = frozenset((torch.bfloat16, torch.float16, torch.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a call asks for beyond its tensors; see `chunk_kda`."""

    scale: float | None = None
    initial_state: Tensor | None = None
    gate: Gate | None = None
    qk_norm: bool = False
    beta_logits: bool = False
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """One checked call; N sequences, of T tokens each or packed."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV, K], gate inputs where there is a gate
    beta: Tensor  # [B, T, HV], logits where beta_logits
    scale: float
    initial_state: Tensor | None  # [N, HV, K, V]
    gate: Gate | None
    qk_norm: bool
    beta_logits: bool
    cu_seqlens: Tensor | None  # [N + 1], on the tensors' device
    N: int
    dtype: torch.dtype  # that is computed in and that the state has

    @property
    def needs_grad(self) -> bool:
        """Whether autograd must follow this call."""
        tensors = [self.q, self.k, self.v, self.g, self.beta, self.initial_state]
        if self.gate is not None:
            tensors += [self.gate.A_log, self.gate.dt_bias]
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in tensors
        )

    @property
    def lower_bound(self) -> float:
        """The bound of the gate's law, 0 where it has none."""
        return 0.0 if self.gate is None else self.gate.lower_bound or 0.0

    def state(self) -> Tensor:
        """Return the state [N, HV, K, V] to start from."""
        if self.initial_state is not None:
            return self.initial_state
        shape = (self.N, self.v.shape[2], self.q.shape[3], self.v.shape[3])
        return self.v.new_zeros(shape, dtype=self.dtype)

    def prepared(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, g and beta with norms, gate law and sigmoid done, in torch."""
        q, k, g, beta = self.q, self.k, self.g, self.beta
        if self.qk_norm:
            q, k = (l2_norm(x.to(self.dtype)) for x in (q, k))
        if self.gate is not None:
            g = self.gate.log_decay(g)
        if self.beta_logits:
            beta = beta.to(self.dtype).sigmoid()
        return q, k, g, beta

    def plain(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v, g and beta as the plain forms take them: as many heads each."""
        q, k, g, beta = self.prepared()
        group = self.v.shape[2] // q.shape[2]
        if group > 1:
            q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
        return q, k, self.v, g, beta


def check_arguments(
    where: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: Options
) -> Arguments:
    """Check a call.

    Raises:
        KernelInputError: Names the argument, what was expected and what was found.
    """
    gate = options.gate
    dtype = torch.float32
    if not _clearly_fit(q, k, v, g, beta, gate):
        dtype = _check_tensors(where, q, k, v, g, beta, gate)
    B, T, _, K = q.shape
    cu_seqlens, N = None, B
    if options.cu_seqlens is not None:
        cu_seqlens = check_packed(where, options.cu_seqlens, rows=B, length=T).to(v.device)
        N = len(cu_seqlens) - 1
    state = options.initial_state
    if state is not None:
        shape = (N, v.shape[2], K, v.shape[3])
        expect(where, v=(v, "B T HV V"), initial_state=(state, " ".join(map(str, shape))))
        expect_dtype(where, dtype, initial_state=state)
    scale = 1 / math.sqrt(K) if options.scale is None else options.scale
    return Arguments(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=state,
        gate=gate,
        qk_norm=options.qk_norm,
        beta_logits=options.beta_logits,
        cu_seqlens=cu_seqlens,
        N=N,
        dtype=dtype,
    )


def _clearly_fit(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, gate: Gate | None
) -> bool:
    """Say whether the tensors pass `_check_tensors` with fp32, a tenth of its time before a launch.

    Of short sequences, the checks are what takes longest. False may be wrong.
    """
    tensors = [q, k, v, g, beta]
    if gate is not None:
        tensors += [gate.A_log, gate.dt_bias]
    if not all(
        isinstance(x, Tensor) and x.dtype in _UP_TO_SINGLE and x.device == q.device
        for x in tensors
    ):
        return False
    if q.ndim != 4 or v.ndim != 4 or 0 in q.shape[2:] or 0 in v.shape[2:]:
        return False
    (B, T, H, K), HV = q.shape, v.shape[2]
    of_gate = gate is None or (gate.A_log.shape == (HV,) and gate.dt_bias.shape == (HV, K))
    rows = k.shape == q.shape and v.shape[:2] == (B, T) and HV % H == 0
    return rows and of_gate and g.shape == (B, T, HV, K) and beta.shape == (B, T, HV)


def _check_tensors(
    where: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, gate: Gate | None
) -> torch.dtype:
    """Return the dtype to compute in; refuse the first argument that does not fit."""
    specs = {"q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T HV V")}
    sizes = expect(where, **specs)
    _check_groups(where, v, H=sizes["H"])
    specs |= {"g": (g, "B T HV K"), "beta": (beta, "B T HV")}
    if gate is not None:
        specs |= {"A_log": (gate.A_log, "HV"), "dt_bias": (gate.dt_bias, "HV K")}
    expect(where, **specs)
    return expect_precision(where, **{name: tensor for name, (tensor, _) in specs.items()})


def _check_groups(where: str, v: Tensor, *, H: int) -> None:
    if v.shape[2] % H:
        raise KernelInputError(
            "v has the wrong number of heads",
            where=where,
            expected=f"[B, T, HV, V] with HV a multiple of q's and k's {H}",
            found=list(v.shape),
            hint="Value head h reads the query and key of head h // (HV // H).",
        )
