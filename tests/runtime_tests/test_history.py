"""`boa-edge report --history`: reports over time, those of one kind in a line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report_browser import find_chromium, measure_page
from report_fakes import HOSTILE, Made, make, provenance

from boa_edge.errors import BoaEdgeError, UsageError
from runtime_tests.history import arrange, history
from runtime_tests.reading import read_report


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, measured: Made, emulated: Made) -> Path:
    """Three reports of one kind (the third is the oldest), one of another, and a file that is none."""
    target = tmp_path_factory.mktemp("history")
    hostile = make(tmp_path_factory.mktemp("hostile"), bundle={"origin": provenance() | {"source": {"model": HOSTILE}}})
    for name, made in (("a", measured), ("b", measured), ("c", measured), ("d", emulated), ("e", hostile)):
        shutil.copytree(made.directory, target / name)
    old = target / "c" / "report.json"
    created = read_report(old).created
    old.write_text(old.read_text().replace(created, "2025-01-01T00:00:00+00:00"))
    (target / "f").mkdir()
    (target / "f" / "report.json").write_text('{"schema_version": 99}')
    return target


def test_reports_of_one_kind_are_a_line_in_order_of_time(directory: Path, tmp_path: Path) -> None:
    found = history(directory, tmp_path / "history.html")
    assert sorted(len(reports) for reports in found.series.values()) == [1, 1, 3]
    longest = max(found.series.values(), key=len)
    assert [report.created for report in longest] == sorted(report.created for report in longest)
    assert longest[0].created.startswith("2025-01-01")
    assert list(found.skipped) == ["f/report.json"]
    assert "schema version 99" in found.skipped["f/report.json"]
    page = (tmp_path / "history.html").read_text()
    assert "<script>" not in page
    assert page.count("2025-01-01 00:00") == 1
    assert page.count('aria-label="KL from the original of 5 reports') == 1
    for execution, count in (("measured", 3), ("emulated", 2)):
        assert page.count(f'aria-label="Decode speed, {execution}, of {count} reports') == 1


def test_other_settings_are_another_line(measured: Made) -> None:
    report = measured.report
    other = report.model_copy(update={"settings": report.settings.model_copy(update={"threads": 2})})
    assert len(arrange([report, other])) == 2


def test_other_text_warm_ups_or_hardware_are_another_line(measured: Made) -> None:
    report = measured.report
    shorter = report.model_copy(update={"fidelity": report.fidelity.model_copy(update={"positions": 12})})
    cold = report.model_copy(update={"settings": report.settings.model_copy(update={"warmup": 0})})
    facts = report.device.fingerprint | {"cores": 8, "memory_bytes": 12 * 2**30}
    bigger = report.model_copy(update={"device": report.device.model_copy(update={"fingerprint": facts})})
    assert len(arrange([report, shorter, cold, bigger])) == 4


def test_nothing_is_replaced_but_such_a_page(directory: Path, tmp_path: Path, measured: Made) -> None:
    inputs = tmp_path / "inputs"
    shutil.copytree(measured.directory, inputs / "a")
    model, link = tmp_path / "model.onnx", tmp_path / "link.html"
    model.write_bytes(b"weights " * 1000)
    link.symlink_to(model)
    for kept in (model, link, inputs / "a" / "report.json", inputs / "a" / "report.html"):
        before = kept.read_bytes()
        with pytest.raises(UsageError, match=r"no page of `report --history`.*Choose another -o"):
            history(inputs, kept)
        assert kept.read_bytes() == before
    with pytest.raises(UsageError, match="not a file"):
        history(inputs, tmp_path)
    with pytest.raises(UsageError, match="nothing can be written there"):
        history(inputs, model / "history.html")
    page = tmp_path / "new" / "history.html"
    history(inputs, page)
    history(directory, page)
    assert "<title>boa-edge: 5 reports over time</title>" in page.read_text()


def test_a_directory_without_reports_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BoaEdgeError, match=r"holds no readable report\.json"):
        history(tmp_path, tmp_path / "history.html")
    with pytest.raises(BoaEdgeError, match="no such directory"):
        history(tmp_path / "absent", tmp_path / "history.html")
    assert not (tmp_path / "history.html").exists()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "printed"), [(1280, False), (360, False), (718, True)])
def test_the_page_fits(directory: Path, unbroken: Made, tmp_path: Path, width: int, printed: bool) -> None:
    if not find_chromium():
        pytest.skip("Chromium is not installed")
    reports = tmp_path / "reports"
    shutil.copytree(directory, reports)
    shutil.copytree(unbroken.directory, reports / "unbroken")
    history(reports, tmp_path / "history.html")
    page = measure_page(tmp_path / "history.html", width, printed=printed)
    assert page.scroll <= width
    assert page.clipped == page.requests == page.labels == page.touching == []
