"""The fields that both families spell alike: hostile values, spellings, what is carried."""

from __future__ import annotations

import pytest

from kimi_convert.config.limits import shown
from tests.unit.config.documents import ABSENT, KINDS, document_of, parsed, read_back, refusal

HOSTILE_NUMBERS = [0, -1, 10**9 + 0.5, 10**30, 10**5000, True, "1", [4], {"a": 1}]
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "v_head_dim",
)

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("value", [*HOSTILE_NUMBERS, None, ABSENT], ids=lambda v: shown(v)[:12])
@pytest.mark.parametrize("name", SIZES)
def test_size_that_no_model_has_is_refused_by_name(kind, name, value):
    assert repr(name) in refusal(kind, **{name: value}).message


@every_kind
def test_a_billion_layers_are_refused_before_they_are_counted(kind):
    assert "'num_hidden_layers'" in refusal(kind, num_hidden_layers=10**9).message


@every_kind
@pytest.mark.parametrize("name", ["q_lora_rank", "num_nextn_predict_layers", "qk_rope_head_dim"])
@pytest.mark.parametrize("value", [-2, 10**30, 10**5000, True, "1", [4]], ids=lambda v: shown(v))
def test_other_hostile_numbers_are_refused_by_name(kind, name, value):
    assert repr(name) in refusal(kind, **{name: value}).message


@every_kind
@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [1.5, True, "</s>", 10**30, {"id": 1}], ids=shown)
def test_token_that_is_no_number_is_refused_by_name(kind, name, value):
    assert repr(name) in refusal(kind, **{name: value}).message


@every_kind
@pytest.mark.parametrize("value", [0, -1e-6, 1.5, float("nan"), float("inf"), "1e-5", True, None])
def test_eps_must_be_a_small_positive_number(kind, value):
    assert "'rms_norm_eps'" in refusal(kind, rms_norm_eps=value).message


@every_kind
@pytest.mark.parametrize("value", [[], "fp8", 8, True], ids=repr)
def test_quantization_must_be_an_object(kind, value):
    assert "'quantization_config'" in refusal(kind, quantization_config=value).message


@every_kind
@pytest.mark.parametrize("value", [0, 1, "false", None], ids=repr)
def test_tied_embeddings_are_true_or_false(kind, value):
    if value is None:
        assert parsed(kind, tie_word_embeddings=None).tie_word_embeddings is False
    else:
        assert "'tie_word_embeddings'" in refusal(kind, tie_word_embeddings=value).message


@every_kind
@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True), ("qk_head_dim", 23)],
)
def test_switch_that_changes_the_maths_is_refused_by_name(kind, name, value):
    assert repr(name) in refusal(kind, **{name: value}).message


@every_kind
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_bias", False),
        ("attention_bias", None),
        ("mlp_bias", False),
        ("qk_head_dim", 24),
    ],
)
def test_switch_that_changes_nothing_is_carried(kind, name, value):
    assert parsed(kind, **{name: value}).carried[name] == value


@every_kind
def test_fewer_key_value_heads_are_refused(kind):
    assert "'num_key_value_heads'" in refusal(kind, num_key_value_heads=2).message
    assert parsed(kind, num_key_value_heads=ABSENT) == parsed(kind)


@every_kind
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param({"dtype": "{}"}, id="new"),
        pytest.param({"dtype": ABSENT, "torch_dtype": "{}"}, id="old"),
        pytest.param({"dtype": "{}", "torch_dtype": "{}"}, id="both"),
        pytest.param({"dtype": "torch.{}"}, id="with-torch"),
    ],
)
def test_dtype_is_read_in_every_spelling(kind, dtype, spelling):
    fields = {
        name: text if text is ABSENT else text.format(dtype) for name, text in spelling.items()
    }
    assert parsed(kind, **fields).dtype == dtype


@every_kind
def test_dtypes_that_contradict_each_other_are_refused_by_name(kind):
    error = refusal(kind, dtype="float16", torch_dtype="bfloat16")
    assert error.message == "config fields 'dtype' and 'torch_dtype' contradict each other"


@every_kind
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "auto", "", "torch.load", 16])
def test_dtype_that_is_no_weight_is_refused(kind, dtype):
    assert "'dtype'" in refusal(kind, dtype=dtype).message


@every_kind
@pytest.mark.parametrize(
    ("stated", "ids"), [(None, ()), (7, (7,)), ([7], (7,)), ([7, 8], (7, 8)), ([], ())]
)
def test_end_tokens_are_none_one_or_more(kind, stated, ids):
    config = parsed(kind, eos_token_id=stated)
    assert config.eos_token_ids == ids
    assert read_back(config) == config


@every_kind
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("some_new_field", {"a": [1, 2.5, None]}),
        ("use_cache", False),
        ("architectures", ["MyModel"]),
        ("hidden_dropout", 0),
        ("auto_map", {"AutoModel": "x.Y"}),
    ],
)
def test_unknown_fields_are_carried_as_they_are(kind, name, value):
    config = parsed(kind, **{name: value})
    assert config.carried[name] == value
    assert read_back(config) == config
    assert document_of(kind, **{name: value})[name] == value


@every_kind
def test_what_is_written_anyway_is_not_carried(kind):
    assert parsed(kind).carried == {}
    absent = parsed(kind, architectures=ABSENT, use_cache=ABSENT, hidden_act=ABSENT)
    assert absent == parsed(kind)


@every_kind
@pytest.mark.parametrize("name", ["use_cache", "hidden_act", "architectures"])
def test_carried_value_wins_over_what_is_written_anyway(kind, name):
    # 1 equals true in Python, but is another value in JSON.
    other = {"use_cache": 1, "hidden_act": "silu", "architectures": ["Mine"]}[name]
    config = parsed(kind, **{name: other})
    assert read_back(config).carried == config.carried
    assert ("use_cache" in config.carried) == (name == "use_cache")


@every_kind
@pytest.mark.parametrize("value", [0, -1, 10**10, "long"])
def test_context_length_is_bounded(kind, value):
    name = "model_max_length" if kind == "kimi_linear" else "max_position_embeddings"
    assert name in refusal(kind, **{name: value}).message


@every_kind
def test_both_spellings_of_the_context_length_must_agree(kind):
    both = {"max_position_embeddings": 64, "model_max_length": 64}
    assert parsed(kind, **both).max_positions == 64
    error = refusal(kind, **(both | {"model_max_length": 65}))
    assert "'max_position_embeddings' and 'model_max_length'" in error.message
