"""From a checkpoint folder to a model that runs: as a whole, or one layer at a time.

Every tensor is checked against config.json before the first one is read. Modules are made without
memory, then each weight is copied once, in its final dtype, to its device; quantised weights are
decoded first. Routed experts, which checkpoints store one by one, are stacked here and nowhere
else. Values are not checked for NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kimi_convert.checkpoints.dtypes import torch_dtype
from kimi_convert.checkpoints.index import open_index
from kimi_convert.checkpoints.weight_reader import WeightReader
from kimi_convert.checkpoints.weights import Weight
from kimi_convert.config.architecture import ModelConfig
from kimi_convert.config.huggingface import read_config
from kimi_convert.kernels.backend import Backend, resolve_backend
from kimi_convert.model.backend import use_backend
from kimi_convert.model.bailing_hybrid import BailingHybrid
from kimi_convert.model.block import DecoderLayer
from kimi_convert.model.kimi_linear import KimiLinear
from kimi_convert.model.language_model import Head
from kimi_convert.model.mla_transformer import MlaTransformer
from kimi_convert.model.moe import Experts
from kimi_convert.model.names.layout import match_checkpoint
from kimi_convert.model.norm import RmsNorm
from kimi_convert.model.numerics import SERVED, Numerics

Model = KimiLinear | MlaTransformer | BailingHybrid
# A layer of 256 experts has gigabytes, which would be resident twice: as pages and as its copy.
_MAPPED_BYTES = 256 * 1024 * 1024
_MODELS: Mapping[str, type[Model]] = {
    "deepseek_v2": MlaTransformer,
    "deepseek_v3": MlaTransformer,
    "kimi_k2": MlaTransformer,
    "kimi_linear": KimiLinear,
    "bailing_hybrid": BailingHybrid,
}


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    numerics: Numerics = SERVED,
    backend: Backend | str | None = None,
) -> Model:
    """Load a whole checkpoint. Its parameters are frozen: unfreeze what is to be trained.

    Args:
        folder: config.json and safetensors, in the format of any supported architecture.
        dtype: of weights and activations; decay parameters and router stay fp32.
        device: where the model runs.
        numerics: choices where implementations disagree; as served by default.
        backend: of KDA, convolutions and norms, "torch" or "triton"; None takes the fastest, which
            on a GPU is Triton, and CUDA C++ for stages of KDA.

    Raises:
        ConfigError: config.json is not valid or not of a supported architecture.
        CheckpointError: tensors are missing, unknown, mis-shaped or not readable.
        KernelInputError: there is no such backend, or it cannot run there.
    """
    with open_layers(
        folder, dtype=dtype, device=device, numerics=numerics, backend=backend
    ) as layers:
        return layers.whole_model()


@contextmanager
def open_layers(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    numerics: Numerics = SERVED,
    backend: Backend | str | None = None,
) -> Iterator[LayerLoader]:
    """Open a checkpoint whose layers are loaded when asked for; arguments as `load_model`'s.

    A model larger than memory runs layer by layer: what the caller drops is freed.

        with open_layers(folder) as layers:
            hidden = layers.embedding()(tokens)
            for layer_idx in range(layers.config.num_layers):
                hidden = layers.layer(layer_idx)(hidden)
            logits = layers.head()(hidden)
    """
    folder, device = Path(folder), torch.device(device)
    if backend is not None:
        backend = resolve_backend(backend, where="open_layers", device=device, dtype=dtype)
    config = read_config(folder)
    index = open_index(folder)
    matched = match_checkpoint(config, index.tensors.values(), where=folder)
    with WeightReader(index) as reader:
        yield LayerLoader(
            config=config,
            numerics=numerics,
            dtype=dtype,
            device=device,
            backend=backend,
            reader=reader,
            weights=matched.weights,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoader:
    """Loads parts of one open checkpoint; keeps none of them."""

    config: ModelConfig
    numerics: Numerics
    dtype: torch.dtype
    device: torch.device
    backend: Backend | None
    reader: WeightReader
    weights: Mapping[str, Weight]  # by parameter

    def embedding(self) -> nn.Embedding:
        """Load the token embedding."""
        with _Unfilled(), torch.device("meta"):
            embedding = nn.Embedding(
                self.config.vocab_size, self.config.hidden_size, dtype=self.dtype
            )
        self._fill(embedding, "embed.")
        return embedding

    def layer(self, layer_idx: int) -> DecoderLayer:
        """Load one decoder layer, counted from 0."""
        with _Unfilled(), torch.device("meta"):
            layer = DecoderLayer(self.config, layer_idx, self.numerics, dtype=self.dtype)
        self._fill(layer, f"layers.{layer_idx}.")
        return layer

    def head(self) -> Head:
        """Load the final norm and the output matrix."""
        with _Unfilled(), torch.device("meta"):
            width, eps = self.config.hidden_size, self.config.rms_norm_eps
            norm = RmsNorm(width, eps=eps, dtype=self.dtype)
            head = Head(self.config, norm, dtype=self.dtype)
        self._fill(norm, "norm.")
        self._fill(head, "embed." if self.config.tie_word_embeddings else "head.")
        return head

    def stored_dtype(self, param: str) -> torch.dtype:
        """Return the dtype that a parameter has in the files, or is decoded to."""
        if param == "head.weight" and self.config.tie_word_embeddings:
            param = "embed.weight"
        return torch_dtype(self.weights[param].dtype)

    def whole_model(self) -> Model:
        """Load everything."""
        with _Unfilled(), torch.device("meta"):
            model = _MODELS[self.config.model_type](self.config, self.numerics, dtype=self.dtype)
        self._fill(model.embed, "embed.")
        for layer_idx, layer in enumerate(model.layers):
            self._fill(layer, f"layers.{layer_idx}.")
        self._fill(model.norm, "norm.")
        if self.config.tie_word_embeddings:
            tied = model.embed.weight
            assert isinstance(tied, nn.Parameter)
            model.head.weight = tied
        else:
            self._fill(model.head, "head.")
        return model

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give every parameter of a module without memory its values, and its kernels a backend."""
        use_backend(module, self.backend)
        mapped = 0
        for name, parameter in list(module.named_parameters()):
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            for stored, part in as_tabled(module, name, values).items():
                self._read(prefix + stored, into=part)
                mapped += part.nbytes
                # Mapped pages count as resident until their files are closed.
                if mapped > _MAPPED_BYTES:
                    self.reader.release()
                    mapped = 0
            setattr(owner, leaf, nn.Parameter(values, requires_grad=False))
        self.reader.release()

    def _read(self, param: str, *, into: torch.Tensor) -> None:
        into.copy_(self.reader.tensor(self.weights[param]))


def as_tabled(module: nn.Module, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the values of a module's parameter by the names that the naming tables have for them.

    Those are the parameter's own name, but for experts: each has its tensors, views of the stack.
    """
    path, _, leaf = name.rpartition(".")
    if not isinstance(module.get_submodule(path), Experts):
        return {name: values}
    return {f"{path}.{expert}.{leaf}.weight": part for expert, part in enumerate(values)}


class _Unfilled(TorchFunctionMode):
    """Leaves out what modules fill their parameters with: every value is read from a file.

    The first random number without memory would also make torch import 900 modules, for 1 s.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)
