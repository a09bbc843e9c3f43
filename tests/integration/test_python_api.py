"""The jobs as Python functions from the package root, with folders given as plain strings."""

from __future__ import annotations

import pytest
import torch

import kimi_convert
from kimi_convert.checkpoints.examples import example_checkpoint
from kimi_convert.config.recipe import Recipe
from kimi_convert.validation.options import ValidationOptions


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    output = str(tmp_path_factory.mktemp("api") / "hybrid")
    result = kimi_convert.convert_checkpoint(str(example_checkpoint()), output, recipe=Recipe())
    assert str(result.output) == output
    return output


def test_every_public_name_is_there():
    assert set(dir(kimi_convert)) == set(kimi_convert.__all__)
    assert all(hasattr(kimi_convert, name) for name in kimi_convert.__all__)
    with pytest.raises(AttributeError, match="no_such_job"):
        _ = kimi_convert.no_such_job


def test_folders_may_be_strings(hybrid, tmp_path):
    assert kimi_convert.inspect_checkpoint(hybrid).to_json()["problems"] == []
    assert kimi_convert.plan_conversion(str(example_checkpoint())).read_bytes > 0
    exported = kimi_convert.export_safetensors(hybrid, str(tmp_path / "exported"))
    assert exported.to_json()["files"]
    text = tmp_path / "text.txt"
    text.write_text("The history of the eye. " * 20)
    report = kimi_convert.validate_checkpoint(
        hybrid,
        teacher=str(example_checkpoint()),
        text=str(text),
        options=ValidationOptions(sequence_length=32, max_tokens=64),
    )
    assert report.passed


def test_a_loaded_model_continues_a_text(hybrid):
    tokenizer = kimi_convert.load_tokenizer(hybrid)
    model = kimi_convert.load_model(hybrid)
    prompt = tokenizer.encode("The history of")
    assert model(torch.tensor([prompt])).shape == (1, len(prompt), model.config.vocab_size)
    ids = list(kimi_convert.generate(model, prompt, max_new_tokens=4))
    assert 1 <= len(ids) <= 4
    assert isinstance(tokenizer.decode(ids), str)


def test_errors_are_one_family():
    with pytest.raises(kimi_convert.KimiConvertError):
        kimi_convert.inspect_checkpoint("no/such/folder")
    recipe = kimi_convert.load_recipe(None)
    assert recipe.keep_layers is None
