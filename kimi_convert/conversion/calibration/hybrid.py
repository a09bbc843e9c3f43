"""A hybrid while all its mixers are trained together, around one copy of its teacher.

Everything but the mixers is the teacher's own and frozen, so its weights serve both models, unless
all of the student is trained: then it has norms, feed-forwards and ends of its own. On a GPU frozen
weights are bf16, which is what a checkpoint holds, and layers compute in bf16; what is trained, the
residual stream and the head are fp32. Where their activations would take much memory, layers are run
again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kimi_convert.conversion.calibration.align import step_size
from kimi_convert.conversion.calibration.ends import Ends
from kimi_convert.conversion.calibration.ranks import Ranks, whole
from kimi_convert.conversion.calibration.rest import FROZEN, own_step_size
from kimi_convert.conversion.calibration.students import Student
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.cache import LayerCache, ModelCache
from kimi_convert.model.loading import as_tabled
from kimi_convert.model.moe import Experts, Router

_HALF = torch.bfloat16
_ACTIVATIONS = 64  # of a layer's size of the stream, roughly: what its backward pass reads
_KEPT_BYTES = 8 * 1024**3  # on a GPU; where there are more, layers are run again


class HybridLayer(nn.Module):
    """One layer of both models."""

    def __init__(
        self,
        teacher: DecoderLayer,
        student: Student,
        matrix: torch.Tensor,
        *,
        rest: DecoderLayer | None = None,
        dtypes: Mapping[str, torch.dtype] = FROZEN,
    ) -> None:
        """Take over a layer, a mixer and its output matrix [F, D], which becomes a parameter.

        Args:
            teacher: the layer.
            student: the mixer.
            matrix: turns its features into its output.
            rest: norms and feed-forward of the student, where they are not the teacher's.
            dtypes: of what is trained of these, by name, as its file has it.
        """
        super().__init__()
        self.teacher = teacher
        self.rest = teacher if rest is None else rest
        self.mixer = student.module.requires_grad_()
        self.matrix = nn.Parameter(matrix.clone(memory_format=torch.contiguous_format))
        self.student = student
        self._dtypes = dtypes
        for name in dtypes:
            self.rest.get_parameter(name).requires_grad_()
        # What a learning rate is multiplied by: of whole parameters, before any is cut.
        self.step_sizes = {
            name: self._step_size(name, value.detach()) for name, value in self.trained().items()
        }
        if matrix.device.type == "cuda":
            for layer in {self.teacher, self.rest}:
                _halve(layer)

    def forward(self, hidden: torch.Tensor, *, keep: bool = False) -> torch.Tensor:
        """Run the student's layer on hidden [B, T, D]; again in the backward pass, unless kept."""
        if keep or not torch.is_grad_enabled():
            return self._student(hidden)
        # No layer draws random numbers; to keep their state would wait for the GPU.
        return checkpoint(self._student, hidden, use_reentrant=False, preserve_rng_state=False)

    def teach(self, hidden: torch.Tensor, cache: LayerCache | None = None) -> torch.Tensor:
        """Run the teacher's layer on hidden [B, T, D], after what a cache holds."""
        return self.teacher(hidden, cache)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained by its name in a layer: "kda.q.weight", "kda.o.weight" as [F, D]."""
        prefix = self.student.prefix
        found = {f"{prefix}{name}": value for name, value in self.mixer.named_parameters()}
        rest = {name: self.rest.get_parameter(name) for name in self._dtypes}
        return {**found, f"{prefix}o.weight": self.matrix, **rest}

    def rounded(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Round one of `trained` to what its file will hold."""
        if name in self._dtypes:
            return value.to(self._dtypes[name]).float()
        return self.student.rounded(name.partition(".")[2], value)

    def stored(self) -> dict[str, torch.Tensor]:
        """Return what is trained as a checkpoint names and shapes it."""
        found: dict[str, torch.Tensor] = {}
        for name, value in self.trained().items():
            all_of_it = whole(value.detach())
            if name in self._dtypes:
                found |= as_tabled(self.rest, name, all_of_it)
            else:
                found[name] = all_of_it.T if name.endswith(".o.weight") else all_of_it
        return found

    def _step_size(self, name: str, value: torch.Tensor) -> float:
        if name in self._dtypes:
            return own_step_size(value)
        return step_size(name.partition(".")[2], value)

    def _student(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.mixer(self.rest.input_norm(hidden)) @ self.matrix
        return hidden + self.rest.feed_forward(hidden)


class Hybrid:
    """A student that shares what it can with its teacher."""

    def __init__(
        self,
        ends: Ends,
        layers: Iterable[HybridLayer],
        *,
        own: Ends | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Take over both models.

        Args:
            ends: of the teacher; on every rank whole, as are the student's where they are frozen.
            layers: each is cut before the next is asked for.
            own: of the student, where not the teacher's.
            ranks: what it is cut among.
        """
        self.teacher_ends, self.ends = ends, own or ends
        self.ranks = ranks or Ranks()
        for module in self.ends.modules if self.ends.trained() else ():
            self.ranks.shard(module)
        self.layers: list[HybridLayer] = []
        for layer in layers:
            self.ranks.shard(layer, also="teach")
            self.layers.append(layer)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.ends.embed.weight.device

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained: "3.kda.q.weight" and so on, "3.kda.o.weight" as [F, D]."""
        layers = {
            f"{n}.{name}": value
            for n, layer in enumerate(self.layers)
            for name, value in layer.trained().items()
        }
        return {**layers, **self.ends.trained()}

    def step_size(self, name: str) -> float:
        """Return what a learning rate is multiplied by for one of `trained`."""
        part, leaf = self._owner(name)
        return part.step_sizes[leaf]

    def rounded(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Round one of `trained` to what its file will hold."""
        part, leaf = self._owner(name)
        return part.rounded(leaf, value)

    def _owner(self, name: str) -> tuple[HybridLayer | Ends, str]:
        """Return what has one of `trained`, and its name there."""
        layer, _, leaf = name.partition(".")
        return (self.layers[int(layer)], leaf) if layer.isdigit() else (self.ends, name)

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the student's last hidden states [B, T, D] fp32 of tokens [B, T]."""
        hidden, keep = self.ends.embed(tokens).float(), self._keeps(tokens)
        with self._arithmetic():
            for layer in self.layers:
                hidden = layer(hidden, keep=keep)
        return hidden

    def repeats_itself(self, tokens: torch.Tensor) -> bool:
        """Say whether every step on tokens [B, T] launches the same, and so little that it shows."""
        mixtures = (m for layer in self.layers for m in layer.modules() if isinstance(m, Experts))
        return (
            self._keeps(tokens)
            and self.ranks.size == 1
            and all(m.runs_all(tokens.numel(), self.device) for m in mixtures)
        )

    @torch.no_grad()
    def run_teacher(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the teacher's last hidden states [B, T, D] fp32 of tokens [B, T]."""
        hidden = self.teacher_ends.embed(tokens).float()
        with self._arithmetic():
            for layer in self.layers:
                hidden = layer.teach(hidden)
        return hidden

    @torch.no_grad()
    def write(self, tokens: torch.Tensor, cache: ModelCache) -> torch.Tensor:
        """Return the teacher's logits [B, vocab] of what follows tokens [B, T], after a cache."""
        hidden = self.teacher_ends.embed(tokens).float()
        with self._arithmetic():
            for layer, kept in zip(self.layers, cache.layers, strict=True):
                hidden = layer.teach(hidden, kept)
        return self.teacher_ends.head(hidden[:, -1])

    def _keeps(self, tokens: torch.Tensor) -> bool:
        """Say whether the activations of tokens [B, T] stay until the backward pass."""
        width = self.ends.embed.embedding_dim
        kept = _ACTIVATIONS * tokens.numel() * width * 4 * len(self.layers)
        return self.device.type == "cuda" and kept <= _KEPT_BYTES

    def _arithmetic(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", _HALF) if self.device.type == "cuda" else nullcontext()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Say whether two modules hold the same parameters, name by name."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


def _halve(layer: DecoderLayer) -> None:
    """Round frozen weights of products to bf16; a router's stay fp32, since they choose."""
    for module in layer.modules():
        if not isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(_HALF)
