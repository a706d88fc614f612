"""`report.html` and the terminal table as text: what they say, what they never say, and what they load."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_fakes import HOSTILE, Made, make, provenance
from rich.console import Console

from runtime_tests import print_summary
from runtime_tests.figure import figure
from runtime_tests.labels import METHODS as LABELS
from runtime_tests.labels import method_name, number, show, show_bytes, visible
from runtime_tests.model import LayerError, OperatorProfile, OperatorTime
from runtime_tests.report import render
from runtime_tests.report.layers import grid
from runtime_tests.report.page import before_and_after, flatten
from toolchain.methods import METHODS

_VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}
_LOADING = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background", "formaction", "ping"}


class Page(HTMLParser):
    """Collects what a page could load, its texts and its elements, and checks that elements nest."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self.feed(document)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in _LOADING:
                self.loads.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name == "style":
                self.styles.append(value or "")
            assert not name.startswith("on"), f"a handler on {tag}"
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.styles if self._open and self._open[-1] == "style" else self.text).append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def test_page_loads_nothing_from_anywhere(emulated: Made, measured: Made, hostile: Made) -> None:
    for made in (emulated, measured, hostile):
        page = Page(made.html)
        assert all(address.startswith("#") for address in page.loads), page.loads
        assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
        references = re.findall(r"url\(([^)]*)\)", " ".join(page.styles) + made.html)
        assert all(reference.startswith("#") for reference in references), references
        assert "@import" not in made.html
        assert "default-src 'none'" in made.html
        assert len(page.ids) == len(set(page.ids)), "two elements of one id"
        assert len(made.html.encode()) < 1_500_000


def test_page_is_repeatable(emulated: Made, tmp_path: Path) -> None:
    again = make(tmp_path)
    assert again.report.as_dict().keys() == emulated.report.as_dict().keys()
    charts = re.compile(r"<svg.*?</svg>", flags=re.DOTALL)
    assert charts.findall(again.html) == charts.findall(emulated.html)


def test_emulated_time_is_never_called_latency(emulated: Made) -> None:
    everything = emulated.html + (emulated.directory / "report.json").read_text() + table(emulated)
    assert "latency" not in everything.lower()
    words = Page(emulated.html).words
    assert "Emulated time to first token" in words
    assert "Emulated time per token, p50" in words
    assert "emulated time, ms" in words
    assert "upper bound" in words
    assert "Token latency" not in words


def test_measured_page_does_not_speak_of_emulation(measured: Made) -> None:
    assert "emulat" not in re.sub(r"<style>.*?</style>", "", measured.html, flags=re.DOTALL).replace(
        "Linux 6.1 (emulated by qemu-aarch64 7.2)", ""
    )
    assert "Token latency, p50" in Page(measured.html).words


def test_page_shows_the_figures_with_their_labels(emulated: Made) -> None:
    words = Page(emulated.html).words
    report = emulated.report
    for entry in (
        report.fidelity.deployed.kl_from_original,
        report.fidelity.quantized.perplexity,
        report.speed.decode_speed,
        report.speed.token_time_p95,
        report.memory.peak_rss,
    ):
        assert entry is not None
        assert show(entry).split()[0] in words
    assert emulated.html.count('class="badge emulated"') >= 8
    assert "w4g32-boa" in words
    assert "Round-to-nearest" in words
    assert "26 of 32 tokens agree" in words
    assert "boa-edge measure BUNDLE --device arm64" in words
    assert all(file.sha256 in words for file in report.deployed.files)


def test_every_chart_has_a_description_and_a_table(emulated: Made) -> None:
    descriptions = re.findall(r'<svg[^>]*role="img" aria-label="([^"]*)"', emulated.html)
    assert len(descriptions) == emulated.html.count("<svg") == 3
    assert "BoA 98.3 MB, 0.049 nats/token" in descriptions[0]
    assert "210 layers" in descriptions[1]
    assert "31 tokens" in descriptions[2]
    assert emulated.html.count("<table") >= 5


def test_text_from_outside_is_escaped(hostile: Made) -> None:
    page = Page(hostile.html)
    assert not {"script", "img"} & set(page.tags)
    assert hostile.html.count("\u202e") == 0
    words = page.words
    assert words.count("<script>alert(1)</script><img/src=x>&⟨U+202E⟩'\"") > 32
    assert HOSTILE.replace("\u202e", "") not in hostile.html
    assert "\u202e" not in table(hostile)


def table(made: Made) -> str:
    stream = io.StringIO()
    print_summary(made.report, Console(file=stream, width=100))
    return stream.getvalue()


def test_terminal_table_fits_and_labels_every_figure(emulated: Made) -> None:
    lines = table(emulated).splitlines()
    assert max(map(len, lines)) <= 100
    assert any("Emulated time to first token" in line and "emulated" in line for line in lines)
    assert any("KL from the original" in line for line in lines)


def test_terminal_table_takes_no_markup_from_names(tmp_path: Path) -> None:
    origin = {**provenance(), "source": {"model": "[bold red]x[/bold red]\x1b[31m"}}
    printed = table(make(tmp_path, bundle={"origin": origin}))
    assert "[bold red]x[/bold red]⟨U+001B⟩[31m" in printed


def layer(name: str, value: float | None) -> LayerError:
    error = None if value is None else figure(value, "relative squared error", "measured")
    return LayerError(name=name, relative_loss=error)


def test_every_method_has_a_name_of_its_own() -> None:
    assert len({method_name(name) for name in METHODS}) == len(METHODS)
    assert all(name in LABELS for name in METHODS)


def test_what_all_cores_have_stands_once_and_what_differs_by_range() -> None:
    cores = {f"cpu{core}": 1800 if core < 4 else 2400 for core in range(9)}
    assert dict(
        flatten({"khz": cores, "governors": {"cpu0": "a", "cpu10": "a", "cpu2": "a"}, "free_bytes": 8_192_000_000})
    ) == {
        "khz": "cpu0-3: 1800, cpu4-8: 2400",
        "governors": "a (all 3)",
        "free": "8.19 GB",
    }
    assert dict(flatten({"a": {"cpu0": 1, "cpu1": 2, "cpu2": 1}})) == {"a": "cpu0: 1, cpu1: 2, cpu2: 1"}
    assert dict(flatten({"cpu": {"cpu0": "denied"}, "empty": {}})) == {"cpu": "denied (1)"}


def test_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    state = {"before": {"status": 0, "gone": 1}, "after": {"status": 3, "zones": {"a": 41.5}}}
    assert before_and_after(state) == [
        ("status", "0", "3"),
        ("gone", "1", "unavailable"),
        ("zones.a", "unavailable", "41.5"),
    ]
    page = make(tmp_path, state={"temperatures_c": {f"zone{n}:cpu": 40.0 + n for n in range(9)}, "load": 7}).html
    assert page.count("Temperatures of the thermal zones") == 1
    assert page.count("zone8:cpu") == 1
    assert "temperatures_c" not in page


def test_small_operators_stand_together_and_nothing_is_lost(measured: Made) -> None:
    times = [("Big", 9_000), ("Medium", 10), *((f"Small{n}", 9) for n in range(5))]
    operators = tuple(OperatorTime(name=name, delegated=False, calls=2, ns=ns) for name, ns in times)
    profile = OperatorProfile(file="p.json", execution="measured", total_ns=10_000, rest_ns=945, operators=operators)
    page = render(measured.report.model_copy(update={"profile": profile}))
    assert "5 more, below 0.1 % each" in page
    assert "Small" not in page
    assert "Run by" not in page
    mixed = profile.model_copy(
        update={"operators": (*operators[:1], operators[1].model_copy(update={"delegated": True}))}
    )
    page = render(measured.report.model_copy(update={"profile": mixed}))
    assert "Run by" in page
    assert "more, below" not in page


def test_layers_stand_by_block_and_kind() -> None:
    cells = grid(
        [
            layer("model.layers.0.self_attn.q_proj", 1e-4),
            layer("model.layers.2.mlp.up_proj", 1e-2),
            layer("transformer.h.1.up_proj", 1e-3),
            layer("lm_head", 0.5),
            layer("model.layers.1.self_attn.q_proj", None),
            layer("model.layers.2.self_attn.q_proj", 0.0),
        ]
    )
    assert cells is not None
    assert cells.kinds == ("q_proj", "up_proj")
    assert cells.blocks == 3
    assert cells.values == {(0, 0): 1e-4, (1, 2): 1e-2, (1, 1): 1e-3}
    assert [cells.strength(value) for value in (1e-4, 1e-3, 1e-2)] == [0.1, 0.55, 1.0]
    assert grid([layer("lm_head", 0.5)]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (94_312_000, "94.3 MB"),
        (999_950_000, "1 GB"),
        (538_000_000, "538 MB"),
    ],
)
def test_bytes(value: int, text: str) -> None:
    assert show_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123456, "0.01235"), (1234.5, "1234"), (28.8, "28.8"), (123456.7, "123,457"), (1.5e-7, "1.500e-07")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_a_figure_says_what_it_is_not() -> None:
    assert show(None) == "not recorded"
    assert show(figure(None, "ms", "emulated")) == "unavailable"
    assert show(figure(float("nan"), "ms", "emulated")) == "unavailable"
    assert visible("a\u0000b\tc\n") == "a⟨U+0000⟩b\tc\n"
