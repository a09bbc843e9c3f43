"""A model on the Triton kernels, here in their interpreter: the same numbers, the same caches."""

from __future__ import annotations

import pytest
import torch

from kimi_convert.errors import KernelInputError, UsageError
from kimi_convert.kernels.backend import Backend
from kimi_convert.model import kda as module
from kimi_convert.model.backend import KernelModule, usable_device, use_backend
from kimi_convert.model.cache import KdaCache
from kimi_convert.model.kda import KdaForm
from kimi_convert.model.loading import load_model, open_layers
from kimi_convert.model.numerics import SERVED, TRANSFORMERS, Numerics, QkNorm
from tests.tiny import linear_attn_config, tiny_config, write_tiny_checkpoint
from tests.unit.kernels.devices import DEVICE
from tests.unit.model.build import random_hidden, relative_error

pytest.importorskip("triton")
# In the interpreter, numpy warns of what is meant to happen: the kernel for gentle gates overflows
# on steep ones, which a second kernel then does right; and minima over NaN are NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CONFIG = tiny_config(
    "kimi_linear", linear_attn_config=linear_attn_config(4, num_heads=1, conv_size=2)
)
BOTH = (Backend.TORCH, Backend.TRITON)
FP32_BOUND = 1e-5  # ADR 4; nine roundings of 2^-24 at most along one mixer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, seed=1)


def mixer(folder, backend, *, numerics=SERVED, dtype=torch.float32):
    with open_layers(
        folder, dtype=dtype, device=DEVICE, numerics=numerics, backend=backend
    ) as layers:
        kda = layers.layer(1).kda
    assert kda is not None
    return kda


def hidden(length):
    return random_hidden(CONFIG, length, batch_size=1).to(DEVICE)


def run(kda, x, pieces, form):
    """Mix the pieces one after another; return the outputs and the cache."""
    cache = KdaCache()
    with torch.inference_mode():
        return torch.cat([kda(piece, cache, form=form) for piece in x.split(pieces, 1)], 1), cache


@pytest.mark.parametrize(
    ("form", "pieces"),
    [
        pytest.param(KdaForm.CHUNK, [7], id="chunk"),
        pytest.param(KdaForm.RECURRENT, [7], id="recurrent"),
        pytest.param(KdaForm.AUTO, [5, 1, 1], id="prefill-and-steps"),
    ],
)
def test_triton_agrees_with_torch(form, pieces, folder):
    x = hidden(7)
    expected, plain = run(mixer(folder, "torch"), x, pieces, form)
    found, cache = run(mixer(folder, "triton"), x, pieces, form)
    assert relative_error(found, expected) < FP32_BOUND
    for name in KdaCache.__slots__:
        assert relative_error(getattr(cache, name), getattr(plain, name)) < FP32_BOUND


@pytest.mark.parametrize(
    "numerics",
    [TRANSFORMERS, Numerics(qk_norm=QkNorm.MEAN_EPS), Numerics(qk_norm=QkNorm.FLOOR)],
    ids=["transformers", "mean-eps", "floor"],
)
def test_numerics_that_no_kernel_fuses_agree_too(numerics, folder):
    x = hidden(6)
    kdas = (mixer(folder, backend, numerics=numerics) for backend in BOTH)
    expected, found = (run(kda, x, [5, 1], KdaForm.AUTO)[0] for kda in kdas)
    assert relative_error(found, expected) < FP32_BOUND


@pytest.fixture
def steps(monkeypatch):
    """The calls of the fused decode step."""
    calls = []
    step = module.kda_mixer_step_

    def counted(*args, **kwargs):
        calls.append(kwargs["backend"])
        return step(*args, **kwargs)

    monkeypatch.setattr(module, "kda_mixer_step_", counted)
    return calls


def test_decode_on_triton_is_one_launch_over_the_states(folder, steps):
    kda, x, cache = mixer(folder, "triton"), hidden(4), KdaCache()
    with torch.inference_mode():
        kda(x[:, :2], cache)
        held = [getattr(cache, name).data_ptr() for name in KdaCache.__slots__]
        assert steps == []
        for t in (2, 3):
            kda(x[:, t : t + 1], cache)
    assert steps == [Backend.TRITON] * 2
    assert [getattr(cache, name).data_ptr() for name in KdaCache.__slots__] == held


@pytest.mark.parametrize(
    ("backend", "form", "numerics"),
    [
        pytest.param("torch", KdaForm.AUTO, SERVED, id="torch"),
        pytest.param("triton", KdaForm.CHUNK, SERVED, id="chunk-asked-for"),
        pytest.param("triton", KdaForm.AUTO, TRANSFORMERS, id="other-numerics"),
    ],
)
def test_the_fused_step_is_not_taken_where_it_is_not_the_same(
    backend, form, numerics, folder, steps
):
    kda = mixer(folder, backend, numerics=numerics)
    run(kda, hidden(3), [2, 1], form)
    assert steps == []


def test_gradients_on_triton_are_those_of_torch(folder, steps):
    found = []
    for backend in BOTH:
        kda, x = mixer(folder, backend).requires_grad_(), hidden(3).requires_grad_()
        cache = KdaCache()
        mixed = torch.cat([kda(piece, cache) for piece in x.split([2, 1], 1)], 1)
        leaves = (x, *kda.parameters())
        found.append(torch.autograd.grad(mixed.square().sum(), leaves))
    assert steps == []
    for plain, triton in zip(*found, strict=True):
        assert relative_error(triton, plain) < 10 * FP32_BOUND


def test_backend_reaches_every_module_that_calls_a_kernel(folder):
    model = load_model(folder, device=DEVICE, backend="torch")
    parts = [part for part in model.modules() if isinstance(part, KernelModule)]
    assert {type(part).__name__ for part in parts} == {
        "KimiDeltaAttention",
        "OutputNorm",
        "RmsNorm",
    }
    assert {part.backend for part in parts} == {Backend.TORCH}
    use_backend(model.layers[0], None)
    assert model.layers[0].input_norm.backend is None
    assert model.layers[1].input_norm.backend is Backend.TORCH


def test_backend_is_left_to_the_device_by_default(folder):
    model = load_model(folder)
    assert {p.backend for p in model.modules() if isinstance(p, KernelModule)} == {None}


@pytest.mark.parametrize(
    ("backend", "dtype", "word"),
    [
        ("cuda", torch.float32, "no such backend"),
        ("triton", torch.float64, "no fp64"),
        ("triton", torch.float32, "need a CUDA device"),
    ],
)
def test_backend_that_cannot_run_is_refused_before_anything_is_read(
    backend, dtype, word, tmp_path, monkeypatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelInputError, match=word):
        load_model(tmp_path / "nothing here", dtype=dtype, backend=backend)


def test_device_that_is_not_there_is_wrong_usage():
    with pytest.raises(UsageError, match="no such device"):
        usable_device("quantum")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_whole_models_agree_on_a_gpu(dtype, tmp_path):
    # Without experts: where two score almost alike, rounding decides between them.
    config = tiny_config(
        "kimi_linear",
        first_k_dense_replace=4,
        linear_attn_config=linear_attn_config(4, num_heads=4, head_dim=128),
    )
    folder = write_tiny_checkpoint(tmp_path, config, seed=4)
    tokens = torch.randint(config.vocab_size, (2, 300), device="cuda")
    # See the bounds of kimi_convert.validation.consistency.
    bound = FP32_BOUND if dtype == torch.float32 else 4 * 2 * torch.finfo(dtype).eps
    logits = []
    for backend in (*BOTH, None):  # None: the fastest, for bf16 partly in CUDA C++
        model = load_model(folder, dtype=dtype, device="cuda", backend=backend)
        with torch.inference_mode():
            logits.append(model(tokens))
    assert relative_error(logits[1], logits[0]) < bound
    assert relative_error(logits[2], logits[0]) < bound
