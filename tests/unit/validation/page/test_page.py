from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from kimi_convert.validation.page.charts import charts_of
from kimi_convert.validation.page.data import report_data
from kimi_convert.validation.page.html import page_of
from kimi_convert.validation.parity.run import ParityOptions, compare_implementations
from tests.integration.command_line import run_here
from tests.tiny import tiny_config, write_tiny_checkpoint
from tests.unit.model.tokenizer_folders import write_tiktoken_folder
from tests.unit.validation.page import browser

needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium here")
CHARTS = {
    "errors-by-layer",
    "loss-by-position",
    "kl-by-position",
    "agreement-by-position",
    "memory-by-context",
    "decay-spectrum",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, what `convert` makes of it, and a text."""
    folder = tmp_path_factory.mktemp("page")
    teacher = write_tiny_checkpoint(folder / "teacher", tiny_config("deepseek_v3", vocab_size=300))
    write_tiktoken_folder(teacher)
    done = run_here("convert", teacher, folder / "hybrid", "--no-text")
    assert done.returncode == 0, done.stderr
    text = folder / "text.jsonl"
    text.write_text(json.dumps({"text": "a quick brown fox " * 120}) + "\n")
    return folder


@pytest.fixture(scope="module")
def report(folders):
    done = run_here(
        "parity",
        folders / "hybrid",
        "--against",
        "decode",
        "--against",
        "bfloat16",
        "--tokens",
        40,
        "--new-tokens",
        4,
        "--text",
        folders / "text.jsonl",
        "--teacher",
        folders / "teacher",
        "--report",
        folders / "report",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(folders / "report" / "report.html") in done.stderr
    return folders / "report"


def test_folder_holds_data_page_and_plots(report):
    names = {path.name for path in report.iterdir()}
    assert names == {"report.json", "report.html", *(f"{key}.png" for key in CHARTS)}


def test_data_has_everything_that_is_shown(report):
    data = json.loads((report / "report.json").read_text())
    assert (data["format"], data["passed"]) == (1, True)
    assert [row["mixer"] for row in data["layers"]] == ["kda", "kda", "kda", "mla"]
    assert {row["how"] for row in data["layers"]} != {""}
    assert data["provenance"]["source: model_type"] == "deepseek_v3"
    assert data["quality"]["student"]["by_position"][0]["scores"]["kl"] > 0
    assert len(data["quality"]["probes"]) == 3
    assert data["quality"]["greedy"]["prompts"] > 0
    assert [one["layer_idx"] for one in data["parity"]["decay"]] == [0, 1, 2]
    assert data["memory"][0]["tokens"] == 256
    assert {one["name"] for one in data["parity"]["implementations"]} == {"decode", "bfloat16"}


def test_page_needs_nothing_else(report):
    page = (report / "report.html").read_text()
    assert not re.findall(r"<(?:script|link|img|iframe)|url\(|https?:", page)
    assert page.count("<svg") == len(CHARTS)
    assert all(f'id="{key}"' in page for key in CHARTS)


def test_page_has_a_row_for_every_layer_and_probe(report):
    data = json.loads((report / "report.json").read_text())["quality"]
    page = (report / "report.html").read_text()
    (layers,) = re.findall(r"<h2>Layers beside the teacher's</h2>.*?</section>", page, re.DOTALL)
    (lookups,) = re.findall(r"<h2>Looking up and continuing</h2>.*?</section>", page, re.DOTALL)
    for layer in data["layers"]:
        row = f"<tr><th>{layer['layer_idx']}</th><td>{layer['mixer'].upper()}</td>"
        assert row in layers
        assert f"<td>{layer['cosine']:.3f}</td><td>{layer['norm_ratio']:.3f}</td>" in layers
    for probe in data["probes"]:
        assert f"<th>{probe['name']}, {probe['size']}</th><td>{probe['answers']}</td>" in lookups
    assert f"{data['greedy']['agreed']:.1%} are the teacher's" in lookups


def test_plots_are_drawn(report):
    for key in CHARTS:
        with Image.open(report / f"{key}.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[:2] == (600, 960)
        # Lines, not an empty frame: pixels in the first colour of the palette.
        assert (np.abs(pixels.astype(int) - (0, 114, 178)).sum(-1) < 30).sum() > 100


@needs_chromium
def test_browser_shows_all_of_it_at_every_width(report, tmp_path):
    desktop, phone = browser.layouts(report / "report.html", [1280, 375], tmp_path)
    for found in (desktop, phone):
        assert found["figures"] == len(CHARTS)
        assert found["outside"] == found["empty"] == 0
        assert found["scrolls"] <= found["width"]  # wide tables scroll by themselves
        for words in ("All implementations agree", "Decay spectrum", "bfloat16", "deepseek_v3"):
            assert words in found["text"]
    assert desktop["columns"] == 2
    assert phone["columns"] == 1
    assert phone["smallest"] >= 9  # pixels


@needs_chromium
@pytest.mark.parametrize(
    ("scheme", "ground"), [(browser.LIGHT, (251, 251, 250)), (browser.DARK, (20, 22, 26))]
)
def test_screenshot_is_light_or_dark_as_the_reader_prefers(report, scheme, ground, tmp_path):
    pixels = browser.screenshot(report / "report.html", scheme, (1280, 1200), tmp_path)
    assert tuple(pixels[5, 5]) == ground
    # Ink on it: text and lines of the other end of the scale.
    brightness = pixels.mean(-1)
    ink = brightness < 80 if scheme == browser.LIGHT else brightness > 200
    assert 0.001 < ink.mean() < 0.2
    green = pixels[..., 1].astype(int) - pixels[..., 0]
    assert (green > 40).sum() > 200  # the verdict


def test_hostile_names_are_text(folders, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    folder = write_tiny_checkpoint(tmp_path / name, tiny_config("kimi_linear"))
    options = ParityOptions(against=("torch",), tokens=8, new_tokens=0)
    report = compare_implementations(folder, [folder], options=options)
    page = page_of(report_data(folder, report))
    assert "<img" not in page
    assert "&lt;img src=x" in page


def test_a_difference_is_shown_where_it_starts(tmp_path):
    from tests.parity import faults

    folder = write_tiny_checkpoint(tmp_path / "good", tiny_config("kimi_linear"))
    wrong = faults.artifact_with(faults.permute_heads_of_k, folder, tmp_path / "wrong")
    options = ParityOptions(against=("torch",), tokens=20, new_tokens=0)
    report = compare_implementations(folder, [wrong], options=options)
    page = page_of(report_data(folder, report))
    assert "Implementations differ" in page
    assert "layers.1.kda.k" in page
    assert "DIFFERS" in page


def test_without_a_text_there_are_fewer_charts(folders):
    options = ParityOptions(against=("decode",), tokens=8, new_tokens=0)
    report = compare_implementations(folders / "hybrid", options=options)
    data = report_data(folders / "hybrid", report)
    assert {chart.key for chart in charts_of(data)} == {
        "errors-by-layer",
        "memory-by-context",
        "decay-spectrum",
    }


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--report", "hybrid"), 3, "output"),
        (("--teacher", "teacher"), 2, "--report DIR"),
        (("--report", "new", "--teacher", "teacher"), 2, "--text"),
    ],
)
def test_wrong_calls_write_nothing(folders, arguments, code, words, monkeypatch):
    monkeypatch.chdir(folders)
    before = sorted(path.name for path in folders.rglob("*"))
    done = run_here("parity", "hybrid", "--against", "decode", "--tokens", 8, *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert sorted(path.name for path in folders.rglob("*")) == before


def test_report_needs_matplotlib(folders, monkeypatch):
    monkeypatch.setattr("kimi_convert.validation.page.make.find_spec", lambda package: None)
    done = run_here("parity", folders / "hybrid", "--report", folders / "none")
    assert done.returncode == 2
    assert "kimi-convert[report]" in done.stderr
