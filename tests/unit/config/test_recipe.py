"""Recipes: every field's default and bounds, and files that are refused by the field's name."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.config.calibration import (
    AlignRecipe,
    CalibrationRecipe,
    DistilledParameters,
    DistillRecipe,
    InitMethod,
)
from kimi_convert.config.limits import shown
from kimi_convert.config.recipe import (
    Recipe,
    RopeHandling,
    default_recipe,
    load_recipe,
    with_layers,
    with_training,
    without_text,
)
from kimi_convert.errors import RecipeError

FITTED = CalibrationRecipe
DEFAULTS = {
    "init": {"method": "search"},
    "calibration": {
        "tokens": 131072,
        "sequence_length": 512,
        "search_tokens": 10240,
        "validation_tokens": 8192,
    },
    "align": {"steps": 0, "tokens_per_step": 512, "learning_rate": 3e-3},
    "distill": {
        "tokens": 0,
        "parameters": "mixers",
        "tokens_per_step": 8192,
        "learning_rate": 1e-3,
        "written_tokens": 0,
    },
    "keep_layers": "auto",
    "rope": "fold",
    "short_conv_size": 4,
    "qk_rms": 8.0,
    "v_rms": 0.3,
    "half_life_tokens": [0.3, 10.0],
    "output_scale": 0.4,
    "output_format": "kimi_linear",
    "seed": 0,
}


@pytest.fixture
def load(tmp_path):
    def write_and_load(text):
        path = tmp_path / "recipe.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path)

    return write_and_load


def refusal(load, text):
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert caught.value.where.endswith("recipe.toml")
    return caught.value


def test_no_file_gives_the_defaults():
    assert load_recipe(None) == default_recipe()
    assert load_recipe(None).to_json() == DEFAULTS


def test_recipe_without_text_fits_nothing():
    assert without_text(default_recipe()) == Recipe()
    document = Recipe().to_json()
    assert (document["keep_layers"], document["rope"]) == ("released", "drop")
    assert not {"init", "calibration", "align", "distill"} & set(document)


@pytest.mark.parametrize("text", ["", "# nothing", "[layers]\n[mla]\n[kda]\n[align]"])
def test_file_that_says_nothing_gives_the_defaults(load, text):
    assert load(text) == default_recipe()


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ('[layers]\nkeep = "auto"', {}),
        ('[layers]\nkeep = "released"', {"choose_layers": False}),
        ("[layers]\nkeep = [3, 7]", {"keep_layers": (3, 7), "choose_layers": False}),
        ("[layers]\nkeep = [7, 3]", {"keep_layers": (3, 7), "choose_layers": False}),
        ("[layers]\nkeep = []", {"keep_layers": (), "choose_layers": False}),
        ('[init]\nmethod = "kil"', {"calibration": FITTED(method=InitMethod.KIL)}),
        ("[calibration]\ntokens = 65536", {"calibration": FITTED(tokens=65536)}),
        (
            "[calibration]\nsequence_length = 128\nsearch_tokens = 4096",
            {"calibration": FITTED(sequence_length=128, search_tokens=4096)},
        ),
        (
            "[align]\nsteps = 9\nlearning_rate = 1e-4",
            {"calibration": FITTED(align=AlignRecipe(steps=9, learning_rate=1e-4))},
        ),
        (
            "[distill]\ntokens = 100000\ntokens_per_step = 1000",
            {"calibration": FITTED(distill=DistillRecipe(tokens=100000, tokens_per_step=1000))},
        ),
        (
            '[distill]\nparameters = "all"',
            {"calibration": FITTED(distill=DistillRecipe(parameters=DistilledParameters.ALL))},
        ),
        ('[mla]\nrope = "fold"', {}),
        ('[mla]\nrope = "drop"', {"rope": RopeHandling.DROP}),
        ("[kda]\nshort_conv_size = 2", {"short_conv_size": 2}),
        ("[kda]\nqk_rms = 2.5", {"qk_rms": 2.5}),
        ("[kda]\nqk_rms = 2", {"qk_rms": 2.0}),
        ("[kda]\nv_rms = 1e-3", {"v_rms": 1e-3}),
        ("[kda]\nhalf_life_tokens = [1, 2.5]", {"half_life_tokens": (1.0, 2.5)}),
        ("[kda]\nhalf_life_tokens = [3, 3]", {"half_life_tokens": (3.0, 3.0)}),
        ("[kda]\noutput_scale = 1.0", {"output_scale": 1.0}),
        ("[kda]\nseed = 7", {"seed": 7}),
    ],
)
def test_every_field_is_read_and_the_others_keep_their_defaults(load, text, changes):
    assert load(text) == replace(default_recipe(), **changes)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("", {}),
        ('[layers]\nkeep = "released"', {}),
        ("[layers]\nkeep = [0]", {"keep_layers": (0,)}),
        ("[kda]\nqk_rms = 2", {"qk_rms": 2.0}),
    ],
)
def test_copy_needs_no_text_and_keeps_the_released_pattern(load, text, changes):
    assert load(f'[init]\nmethod = "copy"\n{text}') == replace(Recipe(), **changes)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        pytest.param('[layers]\nkeep = "auto"', "layers.keep", id="chosen-layers"),
        pytest.param('[mla]\nrope = "fold"', "mla.rope", id="fold"),
        pytest.param("[calibration]\ntokens = 9", "calibration.tokens", id="tokens"),
        pytest.param("[align]\nsteps = 9", "align.steps", id="alignment"),
    ],
)
def test_what_needs_text_is_refused_with_copy(load, text, name):
    assert repr(name) in refusal(load, f'[init]\nmethod = "copy"\n{text}').message


@pytest.mark.parametrize(
    ("text", "name"),
    [
        pytest.param('[init]\nmethod = "magic"', "init.method", id="method"),
        pytest.param("[init]\nmethod = 3", "init.method", id="method-number"),
        pytest.param("[calibration]\ntokens = 1000", "calibration.tokens", id="tokens-few"),
        pytest.param("[calibration]\ntokens = 1e5", "calibration.tokens", id="tokens-float"),
        pytest.param(
            "[calibration]\nsequence_length = 8", "calibration.sequence_length", id="length"
        ),
        pytest.param(
            "[calibration]\nsearch_tokens = 512", "calibration.search_tokens", id="search-one-row"
        ),
        pytest.param(
            "[calibration]\nvalidation_tokens = 0", "calibration.validation_tokens", id="check"
        ),
        pytest.param("[align]\nsteps = -1", "align.steps", id="steps"),
        pytest.param("[align]\ntokens_per_step = 0", "align.tokens_per_step", id="align-batch"),
        pytest.param("[align]\nlearning_rate = 0", "align.learning_rate", id="align-rate"),
        pytest.param("[distill]\ntokens = -1", "distill.tokens", id="distill-tokens"),
        pytest.param("[distill]\ntokens_per_step = 0", "distill.tokens_per_step", id="batch"),
        pytest.param("[distill]\nlearning_rate = 2", "distill.learning_rate", id="rate"),
        pytest.param('[distill]\nparameters = "none"', "distill.parameters", id="parameters"),
    ],
)
def test_calibration_that_cannot_be_is_refused_by_name(load, text, name):
    assert repr(name) in refusal(load, text).message


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("auto", {}),
        ("released", {"choose_layers": False}),
        ("uniform", {"choose_layers": False}),
        ("7, 3", {"choose_layers": False, "keep_layers": (3, 7)}),
    ],
)
def test_layers_are_read_from_the_command_line(text, changes):
    assert with_layers(default_recipe(), text) == replace(default_recipe(), **changes)


@pytest.mark.parametrize("text", ["", "all", "3,", "-1", "3;7", "٣", "9999999999999"])
def test_layers_that_are_none_are_refused(text):
    with pytest.raises(RecipeError, match=r"layers.keep"):
        with_layers(default_recipe(), text)


def test_amounts_of_training_are_set_apart():
    recipe = with_training(default_recipe(), align_steps=5)
    recipe = with_training(recipe, distill_tokens=10**6)
    assert recipe.calibration is not None
    assert recipe.calibration.align.steps == 5
    assert recipe.calibration.distill.steps == 10**6 // 8192
    assert with_training(recipe) == recipe
    assert with_training(Recipe(), align_steps=0) == Recipe()
    with pytest.raises(RecipeError, match=r"distill.tokens"):
        with_training(Recipe(), distill_tokens=1)


def test_document_of_a_recipe_has_every_field(load):
    document = load("[layers]\nkeep = [1]\n[kda]\nseed = 3").to_json()
    assert document == DEFAULTS | {"keep_layers": [1], "seed": 3}
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize(
    ("text", "name", "hint"),
    [
        pytest.param("no_such_field = 1", "no_such_field", "Remove", id="top-field"),
        pytest.param("[kdaa]\nseed = 1", "kdaa", "Is 'kda' meant?", id="section"),
        pytest.param("[layer]\nkeep = [1]", "layer", "Is 'layers' meant?", id="section-singular"),
        pytest.param("seed = 1", "seed", "", id="field-outside-its-section"),
        pytest.param("[kda]\nsed = 1", "kda.sed", "Is 'kda.seed' meant?", id="field"),
        pytest.param("[kda]\nrope = 'drop'", "kda.rope", "", id="field-of-another-section"),
        pytest.param(
            "[kda]\nconv_size = 4", "kda.conv_size", "Is 'kda.short_conv_size' meant?", id="near"
        ),
        pytest.param("[layers]\nkept = [1]", "layers.kept", "Is 'layers.keep' meant?", id="kept"),
        pytest.param("[mla]\nropes = 'drop'", "mla.ropes", "Is 'mla.rope' meant?", id="ropes"),
    ],
)
def test_unknown_field_is_refused_with_the_one_that_may_be_meant(load, text, name, hint):
    error = refusal(load, text)
    assert error.message.startswith(f"recipe field {name!r} is not known")
    assert error.hint.startswith(hint)
    section = name.rpartition(".")[0]
    assert all(known.startswith(section) for known in error.expected.split(", "))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        pytest.param("layers = 3", "layers", id="section-number"),
        pytest.param("layers = [3]", "layers", id="section-list"),
        pytest.param("[[kda]]\nseed = 1", "kda", id="section-twice"),
        pytest.param('mla = "drop"', "mla", id="section-text"),
        pytest.param("[layers]\nkeep = 3", "layers.keep", id="keep-number"),
        pytest.param("[layers]\nkeep = true", "layers.keep", id="keep-boolean"),
        pytest.param('[layers]\nkeep = "all"', "layers.keep", id="keep-text"),
        pytest.param('[layers]\nkeep = ["3"]', "layers.keep", id="keep-texts"),
        pytest.param("[layers]\nkeep = [1.0]", "layers.keep", id="keep-floats"),
        pytest.param("[layers]\nkeep = [[1]]", "layers.keep", id="keep-lists"),
        pytest.param("[layers]\nkeep = [1, true]", "layers.keep", id="keep-booleans"),
        pytest.param("[layers]\nkeep = [3, 3]", "layers.keep", id="keep-twice"),
        pytest.param("[layers]\nkeep = [-1]", "layers.keep", id="keep-negative"),
        pytest.param("[layers]\nkeep = [1024]", "layers.keep", id="keep-beyond-any-model"),
        pytest.param("[mla]\nrope = true", "mla.rope", id="rope-boolean"),
        pytest.param('[mla]\nrope = "keep"', "mla.rope", id="rope-unknown"),
        pytest.param("[kda]\nshort_conv_size = 0", "kda.short_conv_size", id="conv-zero"),
        pytest.param("[kda]\nshort_conv_size = 17", "kda.short_conv_size", id="conv-large"),
        pytest.param("[kda]\nshort_conv_size = 4.0", "kda.short_conv_size", id="conv-float"),
        pytest.param("[kda]\nseed = -1", "kda.seed", id="seed-negative"),
        pytest.param("[kda]\nseed = 2147483648", "kda.seed", id="seed-large"),
        pytest.param("[kda]\nseed = true", "kda.seed", id="seed-boolean"),
        pytest.param("[kda]\nseed = 1979-05-27", "kda.seed", id="seed-date"),
        *(
            pytest.param(f"[kda]\n{name} = {value}", f"kda.{name}", id=f"{name}={value}")
            for name in ("qk_rms", "v_rms", "output_scale")
            for value in ("0", "-1", "1e5", "nan", "inf", "true", "'1'", "[1]")
        ),
        *(
            pytest.param(
                f"[kda]\nhalf_life_tokens = {value}", "kda.half_life_tokens", id=f"half={value}"
            )
            for value in (
                "1",
                "[]",
                "[1]",
                "[1, 2, 3]",
                "[2, 1]",
                "[0, 1]",
                "[1, 1e8]",
                "[nan, 1]",
                "[1, inf]",
                "[true, 2]",
                "['1', 2]",
            )
        ),
        pytest.param(f"[kda]\nseed = {'9' * 4000}", "kda.seed", id="seed-of-4000-digits"),
        pytest.param(f"[kda]\nqk_rms = {'9' * 4000}", "kda.qk_rms", id="rms-of-4000-digits"),
        pytest.param(
            f"[kda]\nhalf_life_tokens = [1, {'9' * 4000}]",
            "kda.half_life_tokens",
            id="half-of-4000-digits",
        ),
    ],
)
def test_value_that_cannot_be_is_refused_by_name(load, text, name):
    error = refusal(load, text)
    assert error.message == f"recipe field {name!r} is not valid"
    assert error.expected
    assert 0 < len(error.found) < 100


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("this is not TOML", 1, id="first-line"),
        pytest.param("[kda]\nseed = 1\nqk_rms = = 2", 3, id="third-line"),
        pytest.param("[kda]\nseed = 1\nseed = 2\n", 3, id="field-twice"),
        pytest.param("[kda]\n[mla]\n[kda]", 3, id="section-twice"),
    ],
)
def test_broken_toml_says_which_line(load, text, line):
    error = refusal(load, text)
    assert error.message == "recipe file is not readable TOML"
    assert f"at line {line}," in error.found


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"a = '\xff'", id="not-utf-8"),
        pytest.param("a = " + "[" * 100_000, id="nested"),
        pytest.param("a = " + "9" * 5000, id="5000-digits"),
        pytest.param("a = '\x1b[2J'", id="control-character"),
        pytest.param('{"json": true}', id="json"),
        pytest.param('a = "open', id="open-text"),
    ],
)
def test_file_that_is_not_toml_is_refused(load, text):
    error = refusal(load, text)
    assert error.message == "recipe file is not readable TOML"
    assert error.found


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="recipe file is missing"):
        load_recipe(tmp_path / "none.toml")


def test_folder_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="recipe file cannot be read") as caught:
        load_recipe(tmp_path)
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize(("size", "fits"), [(2**20, True), (2**20 + 1, False), (2**40, False)])
def test_size_of_the_file_is_bounded(tmp_path, size, fits):
    path = tmp_path / "recipe.toml"
    path.touch()
    if fits:
        path.write_text("#" * size)
        assert load_recipe(path) == default_recipe()
    else:
        os.truncate(path, size)
        with pytest.raises(RecipeError, match="too large"):
            load_recipe(path)


def test_error_inside_says_which_file_and_why(load):
    error = refusal(load, '[mla]\nrope = "keep"')
    assert (error.expected, error.found) == ("drop or fold", "'keep'")


@pytest.mark.parametrize("kept", [(3, 1), (1, 1), (-1,), (10**9,), (10**5000,)], ids=shown)
def test_recipe_made_in_python_is_checked_too(kept):
    with pytest.raises(RecipeError, match=r"'layers.keep'"):
        Recipe(keep_layers=kept)


# Kimi-Linear-48B-A3B keeps layers 4, 8, ..., 24 and 27, counted from 1.
@pytest.mark.parametrize(
    ("num_layers", "kept"),
    [
        pytest.param(27, (3, 7, 11, 15, 19, 23, 26), id="kimi-linear-48b"),
        pytest.param(8, (3, 7), id="last-is-a-fourth"),
        pytest.param(5, (3, 4), id="one-after-a-fourth"),
        pytest.param(2, (1,), id="shorter-than-a-period"),
        pytest.param(1, (0,), id="one-layer"),
    ],
)
def test_released_pattern_fits_any_depth(num_layers, kept):
    assert Recipe().kept_layers(num_layers) == kept


@given(st.integers(2, 200))
def test_released_pattern_keeps_the_last_layer_and_converts_some(num_layers):
    kept = Recipe().kept_layers(num_layers)
    assert kept[-1] == num_layers - 1
    assert len(kept) < num_layers
    assert list(kept) == sorted(set(kept))


def test_listed_layers_are_kept():
    assert Recipe(keep_layers=(0, 2)).kept_layers(3) == (0, 2)
    assert Recipe(keep_layers=()).kept_layers(3) == ()


def test_layer_that_the_model_lacks_is_refused():
    with pytest.raises(RecipeError, match=r"'layers.keep'") as caught:
        Recipe(keep_layers=(0, 3, 9)).kept_layers(3)
    assert (caught.value.expected, caught.value.found) == ("layers from 0 to 2", "[3, 9]")


def test_recipe_that_converts_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"'layers.keep'") as caught:
        Recipe(keep_layers=(0, 1, 2)).kept_layers(3)
    assert caught.value.expected == "at least one layer to convert"
