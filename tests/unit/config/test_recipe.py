"""Recipes: every field's default and bounds, and files that are refused by the field's name."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_convert.config.limits import shown
from kimi_convert.config.recipe import Recipe, RopeHandling, load_recipe
from kimi_convert.errors import RecipeError

DEFAULTS = {
    "keep_layers": "released",
    "rope": "drop",
    "short_conv_size": 4,
    "qk_rms": 8.0,
    "v_rms": 0.3,
    "half_life_tokens": [0.3, 10.0],
    "output_scale": 0.4,
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
    assert load_recipe(None) == Recipe()
    assert load_recipe(None).to_json() == DEFAULTS


@pytest.mark.parametrize("text", ["", "# nothing", "[layers]\n[mla]\n[kda]"])
def test_file_that_says_nothing_gives_the_defaults(load, text):
    assert load(text) == Recipe()


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ('[layers]\nkeep = "released"', {}),
        ("[layers]\nkeep = [3, 7]", {"keep_layers": (3, 7)}),
        ("[layers]\nkeep = [7, 3]", {"keep_layers": (3, 7)}),
        ("[layers]\nkeep = []", {"keep_layers": ()}),
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
    assert load(text) == replace(Recipe(), **changes)


def test_document_of_a_recipe_has_every_field(load):
    document = load("[layers]\nkeep = [1]\n[kda]\nseed = 3").to_json()
    assert document == DEFAULTS | {"keep_layers": [1], "seed": 3}


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
        assert load_recipe(path) == Recipe()
    else:
        os.truncate(path, size)
        with pytest.raises(RecipeError, match="too large"):
            load_recipe(path)


def test_error_inside_says_which_file_and_why(load):
    error = refusal(load, '[mla]\nrope = "keep"')
    assert (error.expected, error.found) == ("drop", "'keep'")


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
