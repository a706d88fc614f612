"""The report in a real browser, at desktop and at phone width."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_browser import find_chromium, measure_page, print_page, take_screenshot
from report_fakes import Made, activations, make, provenance

SKIP = "BOA_EDGE_SKIP_BROWSER"
PAPER = 718  # A4 less the browser's margins of 1 cm, in CSS pixels

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(os.environ.get(SKIP)), reason=f"{SKIP} is set: the report is not opened in a browser"),
]


@pytest.fixture(autouse=True)
def _browser() -> None:
    assert find_chromium(), f"Chromium is not installed: run `make setup` as root, or set {SKIP}=1 to leave this out"


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("kind", ["emulated", "measured", "hostile", "unbroken"])
def test_page_fits_its_window_and_asks_nobody(kind: str, width: int, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(kind)
    page = measure_page(made.directory / "report.html", width)
    assert page.inner == width
    assert page.scroll <= width
    assert page.clipped == []
    assert page.requests == []
    assert page.labels == [], "texts that reach out of their chart"
    assert page.touching == [], "texts that overlap in a chart"
    assert page.smallest >= 9.5


@pytest.mark.parametrize("kind", ["emulated", "measured", "hostile", "unbroken"])
def test_nothing_is_cut_off_on_paper(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    made: Made = request.getfixturevalue(kind)
    page = measure_page(made.directory / "report.html", PAPER, printed=True)
    assert page.scroll <= PAPER
    assert page.clipped == page.labels == page.touching == []


def test_it_prints_on_a_few_pages(measured: Made, tmp_path: Path) -> None:
    print_page(measured.directory / "report.html", tmp_path / "report.pdf")
    pages = re.findall(rb"/Type /Page\b", (tmp_path / "report.pdf").read_bytes())
    assert 3 <= len(pages) <= 12


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("blocks", [1, 126])
def test_outliers_of_small_and_large_models_fit(tmp_path: Path, blocks: int, width: int) -> None:
    origin = provenance() | activations(blocks)
    page = measure_page(make(tmp_path, bundle={"origin": origin}).directory / "report.html", width)
    assert page.scroll <= width
    assert page.clipped == page.labels == page.touching == []


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, False), (360, True)])
def test_screenshot_shows_a_page(emulated: Made, tmp_path: Path, width: int, dark: bool) -> None:
    target = tmp_path / "page.png"
    take_screenshot(emulated.directory / "report.html", width, 1400, target, dark=dark)
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("L"))[:, :width]
    assert pixels.shape == (1400, width)
    assert pixels.std() > 10
    assert len(np.unique(pixels)) > 50
    assert (np.median(pixels) < 80) == dark
    for band in np.array_split(pixels, 7):
        assert band.std() > 3, "an empty stretch of page"
