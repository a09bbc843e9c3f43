"""Forms that agree are within the bound, and each kind of disagreement is beyond it."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_convert.kernels.kda import chunk_kda, recurrent_kda
from kimi_convert.model import kda
from kimi_convert.model.cache import KdaCache, MlaCache
from kimi_convert.model.loading import load_model
from kimi_convert.validation.consistency import measure_consistency
from kimi_convert.validation.options import ValidationOptions
from tests.tiny import linear_attn_config, tiny_config, write_tiny_checkpoint
from tests.unit.kernels.devices import DEVICE
from tests.unit.validation.build import HYBRID, TEACHER, silent, write_hybrid

RECURRENT, PIECES, DECODE = "recurrent prefill", "prefill in pieces", "decode token by token"
PLAIN = "prefill in plain torch"


def random_tokens(length, rows=2):
    return torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(1))


def measure(folder, tokens, **options):
    return measure_consistency(
        folder,
        tokens,
        source="random",
        options=ValidationOptions(**options),
        on_progress=silent,
    )


def errors(report):
    return {form.form: form.max_relative_error for form in report.forms}


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130])
def test_forms_of_a_hybrid_agree(length, tmp_path):
    report = measure(write_hybrid(tmp_path), random_tokens(length))
    assert list(errors(report)) == [RECURRENT, PIECES, DECODE]
    assert report.bound == 1e-5
    assert report.passed
    assert (report.sequences, report.sequence_length) == (2, length)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_forms_agree_in_half_precision_within_its_bound(dtype, tmp_path):
    report = measure(write_hybrid(tmp_path), random_tokens(130), dtype=dtype)
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert report.bound == 4 * eps * math.sqrt(HYBRID.num_layers)
    assert report.passed
    assert max(errors(report).values()) > 1e-5  # it did run in half precision


def test_source_without_kda_has_no_recurrent_form(tmp_path):
    report = measure(write_tiny_checkpoint(tmp_path, TEACHER), random_tokens(40))
    assert list(errors(report)) == [PIECES, DECODE]
    assert report.passed


ONE_KDA_LAYER = tiny_config(
    "kimi_linear",
    vocab_size=300,
    num_hidden_layers=2,
    linear_attn_config=linear_attn_config(2, num_heads=1, conv_size=2),
)
# See tests/unit/model/test_backend.py.
INTERPRETED = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@INTERPRETED
def test_where_triton_runs_a_prefill_in_plain_torch_is_one_more_form(tmp_path):
    pytest.importorskip("triton")
    folder = write_tiny_checkpoint(tmp_path, ONE_KDA_LAYER)
    report = measure(folder, random_tokens(4, rows=1), device=DEVICE, backend="triton")
    assert list(errors(report)) == [RECURRENT, PIECES, DECODE, PLAIN]
    assert report.passed
    assert errors(report)[PLAIN] > 0  # it did run on something else


@INTERPRETED
def test_kernel_that_differs_from_torch_is_found(tmp_path, monkeypatch):
    pytest.importorskip("triton")

    def wrong_on_triton(*args, backend, **kwargs):
        output, state = chunk_kda(*args, backend=backend, **kwargs)
        return (output * 1.001 if backend == "triton" else output), state

    monkeypatch.setitem(kda._FORMS, kda.KdaForm.CHUNK, wrong_on_triton)
    folder = write_tiny_checkpoint(tmp_path, ONE_KDA_LAYER)
    report = measure(folder, random_tokens(4, rows=1), device=DEVICE, backend="triton")
    failed = {form.form for form in report.forms if not form.passed}
    assert PLAIN in failed
    assert PIECES not in failed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gpu_compares_both_backends_by_itself(dtype, tmp_path):
    report = measure(write_hybrid(tmp_path), random_tokens(130), device="cuda", dtype=dtype)
    assert list(errors(report)) == [RECURRENT, PIECES, DECODE, PLAIN]
    assert report.passed


def wrong_by_a_little(*args, **kwargs):
    output, state = recurrent_kda(*args, **kwargs)
    return output * 1.001, state


@torch.inference_mode()
def test_reported_error_is_that_of_the_models_logits(tmp_path, monkeypatch):
    monkeypatch.setitem(kda._FORMS, kda.KdaForm.RECURRENT, wrong_by_a_little)
    # Without experts, whose pinned weights a plain run does not have.
    config = tiny_config("kimi_linear", vocab_size=300, first_k_dense_replace=4)
    write_tiny_checkpoint(tmp_path, config)
    tokens = random_tokens(40)
    report = measure(tmp_path, tokens)
    model = load_model(tmp_path)
    prefill = model(tokens, kda_form=kda.KdaForm.CHUNK)
    recurrent = model(tokens, kda_form=kda.KdaForm.RECURRENT)
    expected = (recurrent - prefill).abs().max() / prefill.abs().max()
    # Rounding moves logits by some 1e-6 of the largest, the fault by more than 100 times that.
    assert expected > 1e-4
    assert errors(report)[RECURRENT] == pytest.approx(expected.item(), rel=0.02)


def test_recurrence_that_differs_from_the_chunked_form_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(kda._FORMS, kda.KdaForm.RECURRENT, wrong_by_a_little)
    found = measure(write_hybrid(tmp_path), random_tokens(20))
    failed = {form.form for form in found.forms if not form.passed}
    assert failed == {RECURRENT, DECODE}
    assert not found.passed


class ForgetsTheState(KdaCache):
    __slots__ = ()

    def __setattr__(self, name, value):
        super().__setattr__(name, None if name == "state" else value)


class ForgetsTheConvolution(KdaCache):
    __slots__ = ()

    def __setattr__(self, name, value):
        super().__setattr__(name, None if name == "k_conv" else value)


class ForgetsTheFirstToken(MlaCache):
    def append(self, rows):
        kept = super().append(rows)
        return kept[:, 1:] if kept.shape[1] > rows.shape[1] else kept


@pytest.mark.parametrize("fault", [ForgetsTheState, ForgetsTheConvolution, ForgetsTheFirstToken])
def test_cache_that_forgets_is_found(fault, tmp_path, monkeypatch):
    name = "KdaCache" if issubclass(fault, KdaCache) else "MlaCache"
    monkeypatch.setattr(f"kimi_convert.model.cache.{name}", fault)
    report = measure(write_hybrid(tmp_path), random_tokens(20))
    failed = {form.form for form in report.forms if not form.passed}
    assert failed == {PIECES, DECODE}


def test_values_that_are_not_finite_do_not_pass(tmp_path, monkeypatch):
    def spoilt(*args, **kwargs):
        output, state = recurrent_kda(*args, **kwargs)
        return output * math.nan, state

    monkeypatch.setitem(kda._FORMS, kda.KdaForm.RECURRENT, spoilt)
    report = measure(write_hybrid(tmp_path), random_tokens(8))
    assert math.isnan(errors(report)[RECURRENT])
    assert not report.passed


def test_choice_between_equal_experts_is_not_followed_but_counted(tmp_path, monkeypatch):
    # bf16 rounds at 2^-8, and of 1200 choices of 3 experts among 8 some are nearer than that.
    monkeypatch.setitem(kda._FORMS, kda.KdaForm.RECURRENT, wrong_by_a_rounding)
    write_hybrid(tmp_path)
    report = measure(tmp_path, random_tokens(100), dtype="bfloat16")
    assert report.passed
    assert sum(form.rerouted for form in report.forms) > 0


def wrong_by_a_rounding(*args, **kwargs):
    output, state = recurrent_kda(*args, **kwargs)
    return output * (1 + 2**-8), state


def test_same_tokens_give_the_same_report(tmp_path):
    write_hybrid(tmp_path)
    assert measure(tmp_path, random_tokens(30)) == measure(tmp_path, random_tokens(30))
