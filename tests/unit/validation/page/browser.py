"""Pages in headless Chromium: what it makes of them, and what they look like."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import numpy as np
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LIGHT, DARK = 1, 0  # Chromium's preferredColorScheme
_FLAGS = (
    "--headless",
    "--no-sandbox",  # a test may run as root, where the sandbox does not start
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
)
_MEASURE = """
const frames = [...document.querySelectorAll('iframe')];
document.title = JSON.stringify(frames.map(frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const boxes = [...page.querySelectorAll('figure, section, header, h1, h2')]
    .map(box => box.getBoundingClientRect());
  return {
    width: root.clientWidth,
    scrolls: root.scrollWidth,
    columns: new Set([...page.querySelectorAll('figure')]
      .map(box => Math.round(box.getBoundingClientRect().left))).size,
    outside: boxes.filter(box => box.left < 0 || box.right > root.clientWidth + 1).length,
    empty: boxes.filter(box => box.width < 10 || box.height < 10).length,
    figures: page.querySelectorAll('figure svg').length,
    text: page.body.innerText,
    smallest: Math.min(...[...page.querySelectorAll('svg text')]
      .map(text => text.getBoundingClientRect().height)),
  };
}));
"""


def layouts(page: Path, widths: list[int], folder: Path) -> list[dict]:
    """Return what Chromium lays the page out to at each width."""
    source = escape(page.read_text(encoding="utf-8"), quote=True)
    frames = "".join(
        f'<iframe srcdoc="{source}" style="width:{width}px;height:900px;border:0"></iframe>'
        for width in widths
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><body>{frames}"
        f"<script>window.onload = () => {{{_MEASURE}}}</script>",
        encoding="utf-8",
    )
    dom = run("--dump-dom", "--virtual-time-budget=5000", wrapper.as_uri(), folder=folder)
    found = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert found, dom[:500]
    return json.loads(unescape(found[1]))


def screenshot(page: Path, scheme: int, size: tuple[int, int], folder: Path) -> np.ndarray:
    """Return the pixels [H, W, 3] of the page's top."""
    path = folder / f"shot-{scheme}-{size[0]}.png"
    run(
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={size[0]},{size[1]}",
        f"--screenshot={path}",
        page.as_uri(),
        folder=folder,
    )
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def run(*arguments: str, folder: Path) -> str:
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
