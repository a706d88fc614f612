"""Several bundles of one model in one report, and the report in Markdown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from report_browser import find_chromium, measure_page
from report_fakes import HOSTILE, make_bundle, make_device, provenance, reference_tensors, shorten

from boa_edge.errors import UsageError
from runtime_tests import Report, Wishes, measure_together
from runtime_tests.reading import read_report
from runtime_tests.report import to_markdown
from runtime_tests.schema import published_schema
from runtime_tests.variants import directory_names, variant_names


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Report, ...], Path]:
    directory = tmp_path_factory.mktemp("together")
    bundles = [make_bundle(directory / name, origin=provenance(), activations=name) for name in ("int8", "float32")]
    return measure_together(bundles, make_device(), directory / "report", Wishes()), directory / "report"


def test_each_has_a_whole_report_and_the_first_holds_all(together: tuple[tuple[Report, ...], Path]) -> None:
    reports, directory = together
    assert [one.name for one in reports[0].variants] == ["onnx int8", "onnx float32"]
    assert [one.activations for one in reports[0].variants] == ["int8", "float32"]
    assert not reports[1].variants
    assert read_report(directory) == reports[0]
    assert read_report(directory / "onnx-float32") == reports[1]
    jsonschema.validate(json.loads((directory / "report.json").read_text()), published_schema())
    for one, report in zip(reports[0].variants, reports, strict=True):
        assert one.kl_from_original == report.fidelity.deployed.kl_from_original
        assert one.decode_speed == report.speed.decode_speed
        assert one.runtime_size == report.deployed.runtime_size
    link = reports[0].variants[1].report
    assert link is not None
    assert (directory / link).is_file()
    assert f'href="{link}"' in (directory / "report.html").read_text()
    assert set(reports[0].summary()["variants"]) == {"onnx int8", "onnx float32"}
    assert "variants" not in reports[1].summary()


def test_other_questions_are_not_put_side_by_side(tmp_path: Path) -> None:
    tensors = reference_tensors()
    tensors["tokens"] = np.roll(tensors["tokens"], 1)
    bundles = [make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b", tensors=tensors)]
    with pytest.raises(UsageError, match="another reference"):
        measure_together(bundles, make_device(), tmp_path / "report", Wishes())
    assert not (tmp_path / "report").exists()


def test_names_say_no_more_than_it_takes(together: tuple[tuple[Report, ...], Path]) -> None:
    first = together[0][0].deployed
    other = first.model_copy(update={"runtime": "executorch"})
    assert variant_names([first, other]) == ("onnx", "executorch")
    assert variant_names([first, first]) == ("onnx 1", "onnx 2")


def named(path: Path, recipe: str) -> Path:
    return make_bundle(path, origin=provenance() | {"recipe": recipe})


def test_each_has_a_directory_of_its_own_that_a_link_can_name(tmp_path: Path) -> None:
    recipes = ("x", "a b", "a-b", "A-B", "my#1", "r" * 300, "../..", "naïve")
    bundles = [named(tmp_path / str(index), recipe) for index, recipe in enumerate(recipes)]
    reports = measure_together(bundles, make_device(), tmp_path / "report", Wishes(new_tokens=2))
    links = [one.report for one in reports[0].variants[1:]]
    assert links[:4] == [f"onnx-{name}/report.html" for name in ("a-b", "a-b-2", "A-B-3", "my-1")]
    for link, recipe in zip(links, recipes[1:], strict=True):
        assert link is not None
        assert re.fullmatch(r"onnx[\w.-]{,90}/report\.html", link, re.ASCII)
        assert read_report((tmp_path / "report" / link).parent).deployed.recipe_name == recipe


def test_names_of_directories_are_told_apart_whatever_is_in_them() -> None:
    names = directory_names(["a", "a-2", "A", "a ", "日本", "語", ".", "x" * 200, "x" * 201])
    assert len({name.lower() for name in names}) == 9
    assert names[:2] == ("a", "a-2")
    assert max(map(len, names)) < 90


def test_all_are_asked_what_the_shortest_context_has_room_for(tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / name, activations=name) for name in ("int8", "float32")]
    shorten(bundles[1], 39)
    device = make_device(execution="measured")
    reports = measure_together(bundles, device, tmp_path / "report", Wishes(new_tokens=4))
    assert [report.fidelity.positions for report in reports] == [39, 39]
    assert reports[0].settings == reports[1].settings


def test_an_address_in_a_name_is_no_link(together: tuple[tuple[Report, ...], Path]) -> None:
    deployed = together[0][0].deployed.model_copy(update={"model": "https://evil.example/x WWW.evil.example v1.5"})
    title = to_markdown(together[0][0].model_copy(update={"deployed": deployed})).splitlines()[0]
    assert title.startswith(r"### https\://evil.example/x WWW\.evil.example v1.5 ")


def test_markdown_is_a_table_that_nothing_in_it_can_break(together: tuple[tuple[Report, ...], Path]) -> None:
    reports, directory = together
    report = reports[0].model_copy(
        update={"deployed": reports[0].deployed.model_copy(update={"model": f"{HOSTILE}|@nobody#1"})}
    )
    text = to_markdown(report)
    assert (directory / "report.md").read_text().splitlines()[0].startswith("### ")
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (4, 8)
    assert "<script>" not in text
    assert "\u202e" not in text
    assert "|@nobody" not in text
    assert "emulated" in text


@pytest.mark.browser
@pytest.mark.parametrize(("width", "printed"), [(1280, False), (360, False), (718, True)])
def test_the_page_fits(together: tuple[tuple[Report, ...], Path], width: int, printed: bool) -> None:
    if not find_chromium():
        pytest.skip("Chromium is not installed")
    page = measure_page(together[1] / "report.html", width, printed=printed)
    assert page.scroll <= width
    assert page.clipped == page.requests == page.labels == page.touching == []
