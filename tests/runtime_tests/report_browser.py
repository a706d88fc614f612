"""Debian's Chromium, headless: a page at a given width, as a screenshot and as what it measures of itself.

A headless window cannot be narrower than about 500 pixels, so the page stands in a frame of the wanted width. The
frame's document is inline (`srcdoc`), hence of the same origin, and the page around it can measure it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)
_MEASURE = """
<script>
addEventListener("load", () => {
  const frame = document.querySelector("iframe"), root = frame.contentDocument.documentElement;
  const width = frame.contentWindow.innerWidth;
  const clipped = [...frame.contentDocument.querySelectorAll("main *, header *, footer *")].filter((element) => {
    if (element.closest("svg, details:not([open])" + (PRINTED ? "" : ", .scroll"))) return false;
    const box = element.getBoundingClientRect();
    return box.width && (box.right > width + 1 || box.left < -1);
  });
  const labels = [...frame.contentDocument.querySelectorAll("svg text")].filter((text) => {
    const box = text.getBoundingClientRect(), chart = text.closest("svg").getBoundingClientRect();
    return box.left < chart.left - 2 || box.right > chart.right + 2
      || box.top < chart.top - 2 || box.bottom > chart.bottom + 2;
  });
  const touching = [...frame.contentDocument.querySelectorAll("svg")].flatMap((chart) => {
    const boxes = [...chart.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
    return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([, b]) =>
      a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
      .map(([other]) => name + " | " + other));
  });
  document.getElementById("measured").textContent = JSON.stringify({
    inner: width, scroll: root.scrollWidth, height: root.scrollHeight,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    clipped: clipped.map((element) => element.outerHTML.slice(0, 80)),
    labels: labels.map((text) => text.textContent), touching,
    smallest: Math.min(...[...frame.contentDocument.querySelectorAll("svg text")].map((text) =>
      parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b))),
  });
});
</script>
"""


@dataclass(frozen=True)
class Measured:
    """What the page measures of itself, in CSS pixels.

    Attributes:
        inner: the width of its viewport.
        scroll: the width of its content.
        height: of its content.
        requests: addresses that it loaded.
        clipped: elements that reach over its left or right border.
        labels: texts of charts that reach out of their chart.
        touching: pairs of texts of one chart that overlap.
        smallest: the size of the smallest text of a chart.
    """

    inner: int
    scroll: int
    height: int
    requests: list[str]
    clipped: list[str]
    labels: list[str]
    touching: list[str]
    smallest: float


def find_chromium() -> str | None:
    """Debian calls it chromium, Ubuntu chromium-browser."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def measure_page(page: Path, width: int, height: int = 900, *, printed: bool = False) -> Measured:
    """Lay the page out at `width` and measure it; `printed`: as on paper, where nothing scrolls."""
    with tempfile.TemporaryDirectory() as directory:
        wrapper = _wrapper(Path(directory), page, width, height, printed=printed)
        document = _chromium(wrapper, "--dump-dom", "--virtual-time-budget=5000")
    match = re.search(r'<pre id="measured">(.*?)</pre>', document, flags=re.DOTALL)
    assert match is not None, document[:500]
    assert match[1], f"the page did not measure itself: {document[:500]}"
    return Measured(**json.loads(unescape(match[1])))


def take_screenshot(page: Path, width: int, height: int, target: Path, *, dark: bool = False) -> None:
    """A PNG of `width` x `height` pixels."""
    with tempfile.TemporaryDirectory() as directory:
        wrapper = _wrapper(Path(directory), page, width, height)
        extra = ("--blink-settings=preferredColorScheme=0",) if dark else ()
        window = f"--window-size={max(width, 500)},{height}"
        _chromium(wrapper, f"--screenshot={target}", window, "--virtual-time-budget=5000", *extra)


def print_page(page: Path, target: Path) -> None:
    """A PDF, as the browser prints it by default."""
    _chromium(page, f"--print-to-pdf={target}", "--no-pdf-header-footer")


def _wrapper(directory: Path, page: Path, width: int, height: int, *, printed: bool = False) -> Path:
    frame = f'<iframe width="{width}" height="{height}" style="border:0;display:block" srcdoc="'
    style = "<style>body{margin:0}pre{display:none}</style>"
    text = page.read_text(encoding="utf-8")
    content = escape(text.replace("@media print", "@media all") if printed else text, quote=True)
    flag = f"<script>const PRINTED = {str(printed).lower()};</script>"
    wrapper = directory / "wrapper.html"
    head = f'<!DOCTYPE html><meta charset="utf-8">{style}<pre id="measured"></pre>{flag}{_MEASURE}'
    wrapper.write_text(f'{head}{frame}{content}"></iframe>', encoding="utf-8")
    return wrapper


def _chromium(page: Path, *flags: str) -> str:
    program = find_chromium()
    assert program is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [program, *_FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
        result = subprocess.run(command, capture_output=True, timeout=90, check=False)
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-1500:]
    return result.stdout.decode("utf-8")
