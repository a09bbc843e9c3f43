"""Tokens leave no text."""

from __future__ import annotations

from kimi_convert.config.secrets import without_secrets


def test_what_looks_like_a_token_is_blotted_out():
    token = "hf_" + "Abc9" * 8
    text = without_secrets(f"{token}, authorization: Bearer xyz, hf_hub_download, hf_download")
    assert text == "[token], authorization: [token], hf_hub_download, hf_download"


def test_json_stays_json():
    assert without_secrets('{"a": "Bearer xyz"}') == '{"a": "[token]"}'


def test_known_tokens_are_blotted_out_whatever_they_look_like(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my-own-secret")
    text = without_secrets("my-own-secret and stored-one", also="stored-one")
    assert text == "[token] and [token]"


def test_text_without_a_token_stays(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    assert without_secrets("nothing here", also=None) == "nothing here"
