"""What a card says, and what nothing in a file can make it say."""

from __future__ import annotations

import re

import pytest
import yaml

from kimi_convert.hub.card import MARK, CardFacts, card_text, escaped

CONVERSION = {
    "tool": {"name": "kimi-convert", "version": "0.1.0"},
    "source": {
        "name": "tiny",
        "repository": "org/tiny",
        "commit": "0123456789abcdef" * 2 + "01234567",
        "license": "mit",
    },
    "layers": {"kda": [0, 1, 2], "mla": [3]},
    "runtimes": [
        {"runtime": "transformers", "loads": True, "reasons": []},
        {"runtime": "vLLM", "loads": False, "reasons": ["needs a full-rank q"]},
    ],
    "calibration": {},
}
SCORES = {"tokens": 100, "loss": 2.5, "perplexity": 12.18, "kl": None, "top1_agreement": None}
REPORT = {
    "passed": True,
    "consistency": {
        "bound": 1e-5,
        "forms": [{"form": "recurrent prefill", "max_relative_error": 7.4e-07}],
    },
    "quality": {
        "teacher": {"overall": SCORES},
        "student": {"overall": {**SCORES, "loss": 3.5, "kl": 1.25, "top1_agreement": 0.5}},
        "ablated": None,
    },
    "text": {"path": "heldout.jsonl", "sha256": "ab" * 32, "tokens": 100},
    "not_run": [{"check": "ablation", "why": "left out by the options"}],
    "options": {"dtype": "float32", "device": "cpu"},
    "environment": {"kimi_convert": "0.1.0", "torch": "2.13.0"},
}

HOSTILE = [
    "a\n---\nlicense: evil",
    "[click](https://evil.example)",
    "<script>alert(1)</script>",
    "x | y | z",
    "`code` *bold* _it_ ![i](u) #h",
    "\x1b[31mred\x07\x00",
    "‮gnp.exe",
    "'\"\\: {a: b} & *alias !!python/object",
    "y" * 5000,
]


def card(conversion=CONVERSION, report=REPORT, repository="org/tiny-kda"):
    return card_text(CardFacts(repository, conversion, report))


def metadata(text):
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_metadata_is_what_the_hub_reads():
    found = metadata(card())
    assert found == {
        "license": "mit",
        "base_model": "org/tiny",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kimi-linear", "kimi-delta-attention", "linear-attention", "kimi-convert"],
    }


def test_measured_numbers_are_in_the_tables():
    text = card()
    assert "| teacher | 2.5000 | 12.2 | - | - |" in text
    assert "| this checkpoint | 3.5000 | 12.2 | 1.2500 | 50.0% |" in text
    assert "| recurrent prefill | 7.4e-07 |" in text


def test_what_was_not_measured_is_said():
    assert "ablation: left out by the options." in card()
    assert "Nothing was measured on these files." in card(report=None)


def test_runtime_that_does_not_load_it_has_no_example():
    text = card()
    assert "KimiLinearForCausalLM" in text
    assert "vllm serve" not in text
    assert "kimi-convert export onnx" in text
    assert "| vLLM | needs a full-rank q |" in text


def test_generated_card_says_so():
    assert MARK in card()


def test_checkpoint_without_provenance_has_a_card_too():
    text = card({}, None)
    assert "base_model" not in metadata(text)
    assert "A checkpoint in the Kimi-Linear format." in text


@pytest.mark.parametrize("evil", HOSTILE)
@pytest.mark.parametrize("field", ["name", "repository", "commit", "license"])
def test_source_cannot_become_markup_or_metadata(evil, field):
    fields = {"repository": None, field: evil}
    text = card({**CONVERSION, "source": {**CONVERSION["source"], **fields}})
    assert_sound(text, evil)


@pytest.mark.parametrize("evil", HOSTILE)
def test_report_cannot_become_markup_or_metadata(evil):
    forms = [{"form": evil, "max_relative_error": evil}]
    report = {
        **REPORT,
        "consistency": {"bound": evil, "forms": forms},
        "text": {"path": evil, "sha256": evil, "tokens": evil},
        "not_run": [{"check": evil, "why": evil}],
        "options": {"dtype": evil, "device": evil},
        "environment": {"kimi_convert": evil, "torch": evil},
    }
    assert_sound(card(report=report), evil)


@pytest.mark.parametrize("evil", HOSTILE)
def test_runtimes_and_tool_cannot_become_markup(evil):
    runtimes = [{"runtime": evil, "loads": False, "reasons": [evil, 1]}]
    conversion = {**CONVERSION, "runtimes": runtimes, "tool": {"version": evil}}
    assert_sound(card(conversion), evil)


def assert_sound(text, evil):
    found = metadata(text)
    assert set(found) <= {
        "license",
        "base_model",
        "base_model_relation",
        "library_name",
        "pipeline_tag",
        "tags",
    }
    assert found.get("license") in (None, "mit")
    body = re.sub(r"\\.", "", text.split("---\n", 2)[2])  # a backslash takes the meaning away
    for sign in ("\n---\n", "](https://evil", "<script", "![i]", "\x1b", "\x07", "\x00", "‮"):
        assert sign not in body
    assert evil not in body or evil.isalnum()
    assert max(map(len, text.splitlines())) < 2500


@pytest.mark.parametrize(
    ("value", "text"),
    [("plain name-1.5", "plain name-1.5"), ("a|b", r"a\|b"), ("a\nb", "a b"), ("ünï", "ünï")],
)
def test_escaped_text_reads_as_it_was(value, text):
    assert escaped(value) == text
