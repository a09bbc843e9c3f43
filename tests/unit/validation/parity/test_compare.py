from __future__ import annotations

import math

import pytest
import torch

from kimi_convert.validation.parity.compare import compare_traces
from kimi_convert.validation.parity.logits import relative_error
from kimi_convert.validation.parity.stages import LOGITS_PROBE, Probe
from kimi_convert.validation.parity.trace import Trace
from tests.tiny import tiny_config

CONFIG = tiny_config("kimi_linear", num_hidden_layers=2)
K, STATE, HIDDEN = Probe(0, "kda.k"), Probe(0, "kda.state"), Probe(0, "hidden")
SCORES, ROUTER = Probe(1, "moe.scores"), Probe(1, "moe.router")
LAST = Probe(1, "hidden")


def random_trace():
    generator = torch.Generator().manual_seed(3)

    def values(*shape):
        return torch.randn(*shape, generator=generator)

    scores = values(2, 10, 8).sigmoid()
    chosen = scores.topk(2, -1)
    return Trace(
        {
            K: values(2, 10, 16),
            STATE: values(2, 4, 6, 6),
            HIDDEN: values(2, 10, 12),
            SCORES: scores,
            ROUTER: torch.zeros_like(scores).scatter(-1, chosen.indices, chosen.values),
            LAST: values(2, 10, 12),
            LOGITS_PROBE: values(2, 10, 50),
        }
    )


def changed(trace, **changes):
    probes = {"k": K, "state": STATE, "hidden": HIDDEN, "last": LAST, "logits": LOGITS_PROBE}
    probes |= {"scores": SCORES, "router": ROUTER}
    return Trace({**trace.values, **{probes[name]: value for name, value in changes.items()}})


def compare(found, expected, dtype=torch.float32):
    return compare_traces(found, expected, dtype=dtype, config=CONFIG)


def test_a_trace_agrees_with_itself():
    found = compare(random_trace(), random_trace())
    assert found.passed
    assert found.location is None
    assert found.logits.relative_error == 0
    assert found.logits.disagreements == 0
    assert found.hidden == {0: 0, 1: 0}
    assert found.states == {0: 0}


def test_rounding_passes_and_more_does_not():
    trace = random_trace()
    generator = torch.Generator().manual_seed(4)

    def disturbed(size):
        noise = size * torch.randn(2, 10, 50, generator=generator)
        return changed(trace, logits=trace.logits + noise)

    assert compare(disturbed(1e-7), trace).passed
    wrong = compare(disturbed(1e-3), trace)
    assert wrong.failures[0] == "logits"
    assert wrong.location.layer_idx is None
    assert compare(disturbed(1e-3), trace, torch.bfloat16).passed


def test_first_stage_and_first_token_are_named():
    trace = random_trace()
    k, hidden = trace.values[K].clone(), trace.values[HIDDEN].clone()
    k[1, 6:] += 0.5
    hidden[1, 6:] += 0.5
    found = compare(changed(trace, k=k, hidden=hidden), trace)
    assert found.failures == ("layers.0.hidden",)
    assert found.location.name == "layers.0.kda.k"
    assert found.location.first_token == 6


def test_stages_inside_a_layer_do_not_decide():
    trace = random_trace()
    assert compare(changed(trace, k=trace.values[K] + 1), trace).passed


def test_exchanged_axes_of_a_state_are_recognised():
    trace = random_trace()
    found = compare(changed(trace, state=trace.values[STATE].transpose(-1, -2)), trace)
    assert found.location.stage == "kda.state"
    assert "K and V, are exchanged" in found.location.note


def test_other_shape_is_named():
    trace = random_trace()
    found = compare(changed(trace, state=torch.zeros(2, 4, 6, 5)), trace)
    assert found.location.note == "shape [2, 4, 6, 5] instead of [2, 4, 6, 6]"
    assert found.location.error == math.inf


def test_permuted_channels_are_recognised():
    trace = random_trace()
    moved = trace.values[HIDDEN].roll(4, -1)
    found = compare(changed(trace, hidden=moved), trace)
    assert "the same values in another order" in found.location.note
    assert "12 of 12 moved" in found.location.note


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_fail(value):
    trace = random_trace()
    logits = trace.logits.clone()
    logits[0, 0, 0] = value
    assert "logits" in compare(changed(trace, logits=logits), trace).failures


def test_tokens_behind_a_near_tie_are_left_out():
    trace = random_trace()
    scores = trace.values[SCORES].clone()
    second, third = scores[0, 7].topk(3).indices[1:]
    scores[0, 7, third] = scores[0, 7, second] - 1e-9
    tied = changed(trace, scores=scores)
    other = trace.values[ROUTER].clone()
    other[0, 7, third], other[0, 7, second] = other[0, 7, second], 0.0
    last = trace.values[LAST].clone()
    last[0, 7:] += 1.0
    found = compare(changed(tied, router=other, last=last), tied)
    assert found.passed
    assert found.left_out == 3
    assert found.logits.tokens == 17


def test_another_choice_without_a_tie_is_not_left_out():
    trace = random_trace()
    last = trace.values[LAST].clone()
    last[0, 7] += 1.0
    found = compare(changed(trace, router=trace.values[ROUTER].roll(1, -1), last=last), trace)
    assert found.left_out == 0
    assert found.location.stage == "moe.router"


def test_disagreement_is_a_near_tie_or_a_failure():
    trace = random_trace()
    logits = trace.logits.clone()
    row = logits[0, 0]
    row[row.topk(2).indices[1]] = row.max()  # equal, so that the last bit decides
    other = logits.clone()
    other[0, 0, row.argmax()] -= 1e-6
    found = compare(changed(trace, logits=other), changed(trace, logits=logits))
    assert (found.logits.disagreements, found.logits.near_ties) == (1, 1)
    assert found.passed


def test_relative_error_of_zeros():
    zeros = torch.zeros(3)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(torch.ones(3), zeros) == math.inf
    assert relative_error(torch.ones(2), zeros) == math.inf
