"""Converted checkpoints in transformers and mlx-lm: they load where the plan says so, and agree.

Where the plan says that a runtime does not load one, the runtime must indeed refuse it or give
something else.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.config.recipe import Recipe
from kimi_convert.config.target_format import TargetFormat
from kimi_convert.conversion.engine import convert_checkpoint
from kimi_convert.model.loading import load_model, open_layers
from kimi_convert.model.numerics import TRANSFORMERS
from tests.integration.broken import change_tensors
from tests.oracles.comparison import FP32_BOUND, load_theirs, random_tokens, relative_error
from tests.oracles.test_deepseek import CLASSES, yarn
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.conversion import test_trained_whole as whole

transformers = pytest.importorskip("transformers")

NATIVE, MLX = "transformers (native, 5.23 and later)", "mlx-lm"
YARN = {"rope_scaling": yarn(0.707, 0.707)}
V2_LITE = {**YARN, "n_shared_experts": 2}
FITTED = "example-fitted"  # as `demo` does: mixers searched, rotation folded, layers chosen
CASES = {
    "example": (None, {}, None),
    FITTED: (None, {}, None),
    "v3": ("deepseek_v3", {}, None),
    "v3-q_lora-groups-yarn": (
        "deepseek_v3",
        {"q_lora_rank": 20, "n_group": 4, "topk_group": 2, **YARN},
        None,
    ),
    "v3-groups-two-dense-layers": (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 2},
        (0, 2),
    ),
    "v3-no-shared-expert": ("deepseek_v3", {"n_shared_experts": 0}, None),
    "v3-all-dense": ("deepseek_v3", {"first_k_dense_replace": 4}, (0,)),
    "v3-every-other-layer-dense": ("deepseek_v3", {"moe_layer_freq": 2}, None),
    "v3-tied": ("deepseek_v3", {"tie_word_embeddings": True}, None),
    "v3-bf16": ("deepseek_v3", {"dtype": "bfloat16"}, None),
    "v3-nothing-kept": ("deepseek_v3", {}, ()),
    "v2-lite-softmax": ("deepseek_v2", V2_LITE, None),
    "v2-lite-sigmoid": ("deepseek_v2", {**V2_LITE, "scoring_func": "sigmoid"}, None),
    "v2-five-layers": (
        "deepseek_v2",
        {"num_hidden_layers": 5, "scoring_func": "sigmoid", "norm_topk_prob": True},
        None,
    ),
    "no-experts": ("deepseek_v3", {"n_routed_experts": None}, None),
}


def tiny_source(kind, fields):
    if fields.get("n_routed_experts", ...) is None:
        return replace(tiny_config(kind), moe=None)
    return tiny_config(kind, **fields)


@pytest.fixture(scope="module", params=CASES)
def hybrid(request, tmp_path_factory):
    kind, fields, keep = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    source = example_checkpoint()
    if request.param == FITTED:
        return request.getfixturevalue("fitted_example").output
    if kind is not None:
        source = write_tiny_checkpoint(folder / "source", tiny_source(kind, fields), seed=3)
    result = convert_checkpoint(source, folder / "hybrid", recipe=Recipe(keep_layers=keep))
    return result.output


def planned_to_load(folder, runtime):
    runtimes = json.loads((folder / "conversion.json").read_text())["runtimes"]
    (loads,) = (one["loads"] for one in runtimes if one["runtime"] == runtime)
    return loads


def tokens_for(folder):
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    return random_tokens(vocab_size, 2, 130)


def load_native(folder):
    """Return the model, and every tensor that did not find its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations, and initialisation of empty tensors
        model, info = transformers.KimiLinearForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    # A model without shared experts has them with no rows there.
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    problems = {kind: list(names) for kind, names in info.items()}
    problems["missing_keys"] = [n for n in problems["missing_keys"] if sizes.get(n, 1)]
    return model.eval(), {kind: names for kind, names in problems.items() if names}


@torch.inference_mode()
def test_transformers_loads_what_the_plan_says_and_agrees(hybrid):
    tokens = tokens_for(hybrid)
    model, problems = load_native(hybrid)
    ours = load_model(hybrid, numerics=TRANSFORMERS)(tokens)
    error = relative_error(ours, model(tokens, use_cache=False).logits)
    if planned_to_load(hybrid, NATIVE):
        assert not problems
        assert error <= FP32_BOUND
    else:
        assert problems or error > 1000 * FP32_BOUND


def test_mlx_loads_what_the_plan_says_and_agrees(hybrid):
    mx = pytest.importorskip("mlx.core")
    mlx_utils = pytest.importorskip("mlx_lm.utils")
    tokens = tokens_for(hybrid)

    def logits_of_mlx():
        model, _ = mlx_utils.load_model(hybrid)
        model.set_dtype(mx.float32)
        return torch.from_numpy(np.array(model(mx.array(tokens.numpy())).astype(mx.float32)))

    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        if not planned_to_load(hybrid, MLX):
            # q_a and q_b are "not in model"; a field that is missing; an attribute never set.
            with pytest.raises((ValueError, TypeError, AttributeError)):
                logits_of_mlx()
            return
        theirs = logits_of_mlx()
    finally:
        mx.set_default_device(before)
    with torch.inference_mode():
        ours = load_model(hybrid)(tokens)
    assert relative_error(ours, theirs) <= FP32_BOUND


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        pytest.param("deepseek_v3", {"rope_scaling": yarn(1.0, 1.0)}, id="v3-yarn"),
        pytest.param(
            "deepseek_v3", {"rope_scaling": yarn(1.0, 0.707), "q_lora_rank": 20}, id="v3-q_lora"
        ),
        pytest.param("deepseek_v2", YARN, id="v2-yarn"),
        pytest.param("deepseek_v3", {}, id="v3-no-yarn"),
    ],
)
@torch.inference_mode()
def test_kept_layer_is_the_teachers_without_rotation(kind, fields, tmp_path):
    # transformers' own attention of the teacher, its rotated query rows zeroed, is the reference.
    source = write_tiny_checkpoint(tmp_path / "source", tiny_config(kind, **fields), seed=4)
    convert_checkpoint(source, tmp_path / "hybrid")
    query = "q_b_proj" if "q_lora_rank" in fields else "q_proj"
    name = f"model.layers.3.self_attn.{query}.weight"
    change_tensors(source, lambda tensors: tensors[name].view(4, 24, -1)[:, 16:].zero_())
    teacher = load_theirs(CLASSES[kind], source)
    seen = {}
    layer = teacher.model.layers[3]
    layer.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0]))
    layer.self_attn.register_forward_hook(lambda _, args, out: seen.update(mixed=out[0]))
    teacher(random_tokens(96, 2, 70), use_cache=False)
    with open_layers(
        tmp_path / "hybrid", dtype=torch.float32, device="cpu", numerics=TRANSFORMERS
    ) as layers:
        mixed = layers.layer(3).mix(seen["hidden"], None)
    assert relative_error(mixed, seen["mixed"]) <= FP32_BOUND


@pytest.mark.parametrize(
    ("form", "model_class"),
    [
        (TargetFormat.KIMI_LINEAR, "KimiLinearForCausalLM"),
        (TargetFormat.BAILING_HYBRID, "BailingHybridForCausalLM"),
    ],
)
def test_hybrid_of_which_all_was_trained_loads_and_agrees(form, model_class, tmp_path):
    whole.teacher_of(tmp_path, rms_norm_eps=1e-6)
    output = whole.converted(tmp_path, recipe=whole.recipe_of(form=form)).output
    theirs = load_theirs(getattr(transformers, model_class), output)
    tokens = random_tokens(4096, 2, 70)
    with torch.inference_mode():
        ours = load_model(output, numerics=TRANSFORMERS)(tokens)
        assert relative_error(ours, theirs(tokens, use_cache=False).logits) <= FP32_BOUND
