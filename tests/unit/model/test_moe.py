"""Routing and experts: against a dense formula, by case, and in what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kimi_convert.config.architecture import ModelConfig
from kimi_convert.model import moe as moe_module
from kimi_convert.model.moe import MixtureOfExperts, Router
from kimi_convert.model.numerics import SERVED, GroupFill, Numerics, Precision, RouterWeight
from tests.tiny import tiny_config
from tests.unit.model.build import random_hidden, random_layer, relative_error

CONFIGS = {
    "sigmoid": tiny_config("deepseek_v3"),
    "sigmoid-groups": tiny_config("deepseek_v3", n_group=4, topk_group=2),
    "softmax": tiny_config("deepseek_v2", n_shared_experts=2),
    "softmax-groups": tiny_config(
        "deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2
    ),
    "hybrid-no-shared": tiny_config("kimi_linear", num_shared_experts=0),
}
FP64_BOUND = 1e-12


@pytest.fixture(params=CONFIGS, ids=str)
def config(request):
    return CONFIGS[request.param]


def mixture(tmp_path, config, dtype=torch.float64, numerics=SERVED) -> MixtureOfExperts:
    moe = random_layer(tmp_path, config, 2, numerics, dtype=dtype).moe
    assert moe is not None
    return moe


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def dense_formula(moe: MixtureOfExperts, x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Run every expert on one token [D], weighted by zero where it was not chosen."""
    sizes, router, experts = config.moe, moe.router, moe.experts
    assert sizes is not None
    logits = router.weight @ x
    scores = logits.sigmoid() if sizes.scoring == "sigmoid" else logits.softmax(0)
    choice = scores if router.bias is None else scores + router.bias
    if sizes.num_groups > 1:
        groups = choice.view(sizes.num_groups, -1)
        best = 2 if sizes.topk_method == "noaux_tc" else 1
        group_scores = [sum(sorted(group.tolist())[-best:]) for group in groups]
        ranked = sorted(range(sizes.num_groups), key=lambda group: -group_scores[group])
        for group in ranked[sizes.topk_groups :]:
            groups[group] = -torch.inf
    chosen = choice.argsort(descending=True)[: sizes.num_experts_per_token]
    weights = torch.zeros_like(scores)
    weights[chosen] = scores[chosen]
    if sizes.renormalize:
        weights = weights / weights.sum()
    output = sum(
        weights[e] * swiglu(x, experts.gate[e], experts.up[e], experts.down[e])
        for e in range(sizes.num_experts)
    )
    output = output * sizes.routed_scaling_factor
    if moe.shared is not None:
        shared = moe.shared
        output = output + swiglu(x, shared.gate.weight, shared.up.weight, shared.down.weight)
    return output


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 37])
def test_mixture_is_the_dense_formula(length, config, tmp_path):
    moe, x = mixture(tmp_path, config), random_hidden(config, length, dtype=torch.float64)
    expected = torch.stack([dense_formula(moe, token, config) for token in x.flatten(0, 1)])
    assert relative_error(moe(x), expected.view_as(x)) < FP64_BOUND


def test_only_chosen_experts_run_and_each_choice_runs_once(tmp_path, monkeypatch):
    config = CONFIGS["sigmoid"]
    moe, x, rows = mixture(tmp_path, config), random_hidden(config, 5, dtype=torch.float64), []
    run = moe_module._swiglu
    monkeypatch.setattr(
        moe_module, "_swiglu", lambda x, *expert: rows.append(len(x)) or run(x, *expert)
    )
    moe(x[:1, :1])
    assert rows == [1, 1, 1]
    rows.clear()
    moe(x)
    assert sum(rows) == 10 * 3
    assert len(rows) <= 8


def test_router_is_fp32_in_a_bf16_model(tmp_path):
    config = CONFIGS["sigmoid"]
    router = mixture(tmp_path, config, torch.bfloat16).router
    assert router.bias is not None
    assert {router.weight.dtype, router.bias.dtype} == {torch.float32}
    routing = router(random_hidden(config, 4, dtype=torch.bfloat16).flatten(0, 1))
    assert routing.weights.dtype is torch.float32


def test_greedy_ignores_groups(tmp_path):
    config = CONFIGS["softmax"]
    assert config.moe is not None
    grouped = replace(config, moe=replace(config.moe, num_groups=4, topk_groups=2))
    moe, x = mixture(tmp_path, config), random_hidden(config, 9, dtype=torch.float64)
    moe_grouped = mixture(tmp_path / "grouped", grouped)
    assert torch.equal(moe(x), moe_grouped(x))


def test_gradients_reach_input_experts_and_router(config, tmp_path):
    moe = mixture(tmp_path, config).requires_grad_()
    x = random_hidden(config, 40, dtype=torch.float64).requires_grad_()
    moe(x).square().sum().backward()
    bias = moe.router.bias
    for tensor in (x, *(one for one in moe.parameters() if one is not bias)):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def test_correction_bias_takes_part_in_the_choice_alone(tmp_path):
    moe = mixture(tmp_path, CONFIGS["sigmoid"]).requires_grad_()
    moe(random_hidden(CONFIGS["sigmoid"], 5, dtype=torch.float64)).sum().backward()
    assert moe.router.bias is not None
    assert moe.router.bias.grad is None


def router_with(
    bias: list[float],
    numerics: Numerics,
    *,
    dtype: torch.dtype = torch.float32,
    **fields: object,
) -> Router:
    """Return a router over tokens of four features whose logits are the features."""
    config = tiny_config("deepseek_v3", n_routed_experts=4, hidden_size=4, **fields)
    router = Router(config, numerics, dtype=dtype).requires_grad_(requires_grad=False)
    router.weight.copy_(torch.eye(4))
    assert router.bias is not None
    router.bias.copy_(torch.tensor(bias))
    return router


def test_biased_combination_weights_contain_the_bias():
    token = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    fields = {"num_experts_per_tok": 2, "routed_scaling_factor": 1.0}
    bias = [0.5, 0.25, 0.0, -0.5]
    unbiased = router_with(bias, SERVED, **fields)(token)
    biased = router_with(bias, Numerics(router_weight=RouterWeight.BIASED), **fields)(token)
    assert unbiased.experts.tolist() == biased.experts.tolist() == [[0, 1]]
    torch.testing.assert_close(unbiased.weights, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(biased.weights, torch.tensor([[1.0, 0.75]]) / 1.75)


@pytest.mark.parametrize(
    ("fill", "keeps_negative"), [(GroupFill.NEGATIVE_INFINITY, True), (GroupFill.ZERO, False)]
)
def test_group_fill_decides_between_ruled_out_and_negative_experts(fill, keeps_negative):
    # Biased scores: 0.7 and -0.1 in the group that wins, -0.2 and -0.3 in the other.
    router = router_with(
        [0.2, -0.6, -0.7, -0.8],
        Numerics(group_fill=fill),
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
    )
    first, second = router(torch.zeros(1, 4)).experts[0].tolist()
    assert first == 0
    assert (second == 1) == keeps_negative


def test_router_in_model_dtype_rounds_its_logits():
    token = torch.tensor([[1.0, 1.0 + 2**-7, 0.5, 0.0]], dtype=torch.bfloat16)
    fine = torch.eye(4) * (1 + 2**-10)  # not a bf16 number: rounds to 1
    weights = []
    for precision in Precision:
        router = router_with([0.0] * 4, Numerics(router=precision), dtype=torch.bfloat16)
        router.weight.copy_(fine)
        weights.append(router(token).weights)
    difference = relative_error(*weights)
    assert 0 < difference < 2**-8


def test_experts_all_at_once_give_the_same(tmp_path, config):
    moe = mixture(tmp_path, config)
    tokens = random_hidden(config, 30, dtype=torch.float64).flatten(0, 1)
    routing = moe.router(tokens)
    expected = moe.experts(tokens, routing)
    assert relative_error(moe.experts.run_all(tokens, routing), expected) < FP64_BOUND
