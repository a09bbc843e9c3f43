"""What an ONNX export can be asked for, and which combinations exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

from kimi_convert.errors import UsageError
from kimi_convert.exporters.onnx.runtimes import (
    FUSED_EXPERTS,
    INTEGER_WEIGHTS,
    Version,
    largest_opset,
    parse_version,
    shown,
)


class Target(StrEnum):
    """Which operators stand for KDA."""

    ORT = "ort"  # com.microsoft, with functions of the same names for runtimes without them
    ONNX27 = "onnx27"  # the standard's own, of opset 27
    CUSTOM = "custom"  # ai.kimi, with functions as bodies


class CustomBody(StrEnum):
    """What the functions of target `custom` are made of."""

    PORTABLE = "portable"  # standard operators: Scan and Conv
    NESTED = "nested"  # com.microsoft's operators, which ONNX Runtime has kernels for


class WeightPlacement(StrEnum):
    """Where the graph finds its weights."""

    COPY = "copy"  # in a file of their own beside it
    INPLACE = "inplace"  # in the checkpoint's own files, which nothing copies


class MlaForm(StrEnum):
    """What MLA layers keep of the tokens that they have seen."""

    MATERIALISED = "materialised"  # keys and values of every head, as onnxruntime-genai asks for
    LATENT = "latent"  # latents and shared rope keys


class MoeForm(StrEnum):
    """How routed experts run."""

    ACTIVE = "active"  # standard operators: a loop over the experts that some token chose
    FUSED = "fused"  # com.microsoft::MoE, whose weights are laid out in its own order


class Precision(StrEnum):
    """What weights are stored in, and activations computed in."""

    FP32 = "fp32"
    FP16 = "fp16"  # both; decays, norms, scores and states of KDA are fp32
    BF16 = "bf16"  # stored; computed in fp32, since ONNX Runtime has no bf16 products on CPUs


class Quantization(StrEnum):
    """What the matrices of products are stored in."""

    INT4 = "int4"
    INT8 = "int8"


class MatrixRole(StrEnum):
    """What a matrix is for, which decides how many bits it is worth."""

    LARGE = "large"  # of a layer
    # Few weights that much hangs on: low-rank matrices, and the output of KDA. On the example they
    # add 4 % to the file and take 40 % off what int4 costs in loss.
    SENSITIVE = "sensitive"
    EXPERT = "expert"
    EMBEDDING = "embedding"
    HEAD = "head"


_BITS: Mapping[Quantization, Mapping[MatrixRole, int]] = {
    Quantization.INT8: dict.fromkeys(MatrixRole, 8),
    Quantization.INT4: dict.fromkeys(MatrixRole, 4) | {MatrixRole.SENSITIVE: 8},
}

# The first is the default: the older the opset, the more runtimes load the graph.
OPSETS: Mapping[Target, range] = {
    Target.ORT: range(21, 29),
    Target.ONNX27: range(27, 29),
    Target.CUSTOM: range(21, 29),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxOptions:
    """One export; checked when it is made."""

    target: Target = Target.ORT
    custom_body: CustomBody = CustomBody.PORTABLE
    weights: WeightPlacement = WeightPlacement.COPY
    mla: MlaForm = MlaForm.MATERIALISED
    moe: MoeForm | None = None  # None takes the fastest that the other options allow
    precision: Precision = Precision.FP32
    quantize: Quantization | None = None
    last_logits: bool = False  # logits of the last position alone
    opset_version: int | None = None  # of the standard's operators; None takes the oldest
    runtime: str | None = None  # version of the oldest ONNX Runtime that shall load the graph

    def __post_init__(self) -> None:
        """Refuse what cannot be written.

        Raises:
            UsageError: two options exclude each other.
        """
        if self.custom_body is CustomBody.NESTED and self.target is not Target.CUSTOM:
            raise _exclusive("custom body nested", "target custom", f"target {self.target}")
        if self.moe is MoeForm.FUSED and self.weights is WeightPlacement.INPLACE:
            raise _exclusive("fused experts", "weights copy", "weights inplace")
        if self.moe is MoeForm.FUSED and self.target is not Target.ORT:
            raise _exclusive("fused experts", "target ort", f"target {self.target}")
        if self.precision is Precision.BF16 and self.weights is WeightPlacement.INPLACE:
            raise _exclusive("precision bf16", "weights copy", "weights inplace")
        if self.quantize is not None:
            self._check_quantize()
        opsets = OPSETS[self.target]
        if self.opset not in opsets:
            raise UsageError(
                f"target {self.target} cannot be written at this opset",
                expected=f"{opsets.start} to {opsets.stop - 1}",
                found=self.opset,
            )
        if self.runtime is not None:
            self._check_runtime(parse_version(self.runtime))

    def _check_runtime(self, version: Version) -> None:
        """Refuse what the runtime does not load."""
        needs = {
            f"opset {self.opset}": self.opset <= largest_opset(version),
            "fused experts": self.moe is not MoeForm.FUSED or version >= FUSED_EXPERTS,
            "integer weights": self.quantize is None or version >= INTEGER_WEIGHTS,
        }
        unmet = [what for what, met in needs.items() if not met]
        if unmet:
            raise UsageError(
                f"ONNX Runtime {shown(version)} does not load {' and no '.join(unmet)}",
                expected=f"at most opset {largest_opset(version)}; fused experts from "
                f"{shown(FUSED_EXPERTS)} on, integer weights from {shown(INTEGER_WEIGHTS)} on",
                hint="Choose another target, opset or form, or a newer runtime.",
            )

    def _check_quantize(self) -> None:
        """Refuse what the operators on integers cannot do: they are ONNX Runtime's alone."""
        asked = f"quantize {self.quantize}"
        if self.weights is WeightPlacement.INPLACE:
            raise _exclusive(asked, "weights copy", "weights inplace")
        if self.target is not Target.ORT:
            raise _exclusive(asked, "target ort", f"target {self.target}")
        if self.moe is MoeForm.ACTIVE:
            raise _exclusive(asked, "fused experts", "active experts")
        if self.precision is not Precision.FP32:
            raise _exclusive(asked, "precision fp32", f"precision {self.precision}")

    def bits(self, role: MatrixRole) -> int | None:
        """Return the bits of one weight of a matrix, or None if it is not quantised."""
        return None if self.quantize is None else _BITS[self.quantize][role]

    def output_folder(self, checkpoint: Path, output: Path | None) -> Path:
        """Return where the graph is written.

        Raises:
            UsageError: it was left out, and the weights are copied.
        """
        if output is None and self.weights is not WeightPlacement.INPLACE:
            raise UsageError(
                "no output folder was given",
                expected="a new or empty folder, since the weights are copied",
                hint="Give OUTPUT, or --weights inplace to write into the checkpoint's folder.",
            )
        return checkpoint if output is None else output

    @property
    def opset(self) -> int:
        """The version of the standard's operators."""
        return OPSETS[self.target].start if self.opset_version is None else self.opset_version

    @property
    def moe_form(self) -> MoeForm:
        """How routed experts run."""
        if self.moe is not None:
            return self.moe
        old = self.runtime is not None and parse_version(self.runtime) < FUSED_EXPERTS
        fused = self.target is Target.ORT and self.weights is WeightPlacement.COPY and not old
        return MoeForm.FUSED if fused else MoeForm.ACTIVE


def require_onnx() -> None:
    """Check that what builds graphs is installed.

    Raises:
        UsageError: it is not.
    """
    missing = [name for name in ("onnx", "onnx_ir", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UsageError(
            "the ONNX exporter needs packages that are not installed",
            found=f"no {' and no '.join(missing)}",
            hint="Run `pip install 'kimi-convert[onnx]'`.",
        )


def _exclusive(asked: str, expected: str, found: str) -> UsageError:
    return UsageError(f"{asked} cannot be had with {found}", expected=expected, found=found)
