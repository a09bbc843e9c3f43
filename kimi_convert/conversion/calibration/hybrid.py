"""A hybrid while all its mixers are trained together, around one copy of its teacher.

Everything but the mixers is the teacher's own and frozen, so its weights serve both models. On a GPU
they are bf16, which is what a checkpoint holds, and layers compute in bf16; what is trained, the
residual stream and the head are fp32. Layers are run again in the backward pass instead of keeping
their activations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kimi_convert.conversion.calibration.students import Student
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.language_model import Head
from kimi_convert.model.moe import Router

_HALF = torch.bfloat16


class HybridLayer(nn.Module):
    """One layer of both models."""

    def __init__(self, teacher: DecoderLayer, student: Student, matrix: torch.Tensor) -> None:
        """Take over a layer, a mixer and its output matrix [F, D], which becomes a parameter."""
        super().__init__()
        self.teacher = teacher
        self.mixer = student.module.requires_grad_()
        self.matrix = nn.Parameter(matrix.clone())
        self.student = student
        if matrix.device.type == "cuda":
            _halve(teacher)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the student's layer on hidden [B, T, D]."""
        hidden = hidden + self.mixer(self.teacher.input_norm(hidden)) @ self.matrix
        return hidden + self.teacher.feed_forward(hidden)

    def teach(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the teacher's layer on hidden [B, T, D]."""
        return self.teacher(hidden)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained by its name in a layer: "kda.q.weight", "kda.o.weight" as [F, D]."""
        prefix = self.student.prefix
        found = {f"{prefix}{name}": value for name, value in self.mixer.named_parameters()}
        return {**found, f"{prefix}o.weight": self.matrix}


class Hybrid:
    """A student whose every layer shares its feed-forward with the teacher."""

    def __init__(
        self,
        embed: nn.Embedding,
        layers: list[DecoderLayer],
        head: Head,
        students: list[Student],
        matrices: list[torch.Tensor],
    ) -> None:
        """Take over modules and output matrices [F, D]; the matrices become parameters."""
        self.embed, self.head = embed, head
        parts = zip(layers, students, matrices, strict=True)
        self.layers = [HybridLayer(*part) for part in parts]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.embed.weight.device

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained: "3.kda.q.weight" and so on, "3.kda.o.weight" as [F, D]."""
        return {
            f"{n}.{name}": value
            for n, layer in enumerate(self.layers)
            for name, value in layer.trained().items()
        }

    def rounded(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Round one of `trained` to what its file will hold."""
        layer, _, leaf = name.split(".", 2)
        return self.layers[int(layer)].student.rounded(leaf, value)

    def stored(self, layer_idx: int) -> dict[str, torch.Tensor]:
        """Return one layer's parameters as a checkpoint names and shapes them."""
        found = {name: value.detach() for name, value in self.layers[layer_idx].trained().items()}
        return {n: v.T if n.endswith(".o.weight") else v for n, v in found.items()}

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the student's last hidden states [B, T, D] fp32 of tokens [B, T]."""
        hidden = self.embed(tokens).float()
        with self._arithmetic():
            for layer in self.layers:
                hidden = _run_again_later(layer, hidden)
        return hidden

    @torch.no_grad()
    def run_teacher(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the teacher's last hidden states [B, T, D] fp32 of tokens [B, T]."""
        hidden = self.embed(tokens).float()
        with self._arithmetic():
            for layer in self.layers:
                hidden = layer.teach(hidden)
        return hidden

    def _arithmetic(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", _HALF) if self.device.type == "cuda" else nullcontext()


def _run_again_later(layer: HybridLayer, hidden: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return layer(hidden)
    # No layer draws random numbers; to keep their state would wait for the GPU.
    return checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False)


def _halve(layer: DecoderLayer) -> None:
    """Round the weights of products to bf16; a router's stay fp32, since they choose."""
    for module in layer.modules():
        if not isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(_HALF)
