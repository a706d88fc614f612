"""From a bundle to a report on an ARM64 device that is attached to the real adb."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from adb_server import attached_phone, private_server
from adbd import Adbd
from typer.testing import CliRunner

from boa_edge.cli import app
from devices import tools
from exporters import export
from toolchain.quantize import quantize
from toolchain.recipe import parse_recipe

pytestmark = pytest.mark.emulated


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adbd]:
    if tools.find(tools.ADB) is None:
        pytest.skip("no adb client here; `make setup` fetches it")
    base = tmp_path_factory.mktemp("adb")
    with private_server(base), attached_phone(base / "phone") as daemon:
        yield daemon


def last_line(output: str) -> dict[str, object]:
    document = json.loads(output.splitlines()[-1])
    assert isinstance(document, dict)
    return document


def test_a_bundle_is_measured_on_an_attached_device(
    daemon: Adbd, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = parse_recipe(
        {
            "method": "rtn",
            "weights": {"bits": 4, "group_size": 32},
            "calibration": {"sequences": 1, "sequence_length": 32, "held_out_sequences": 1},
        },
        "test",
    )
    quantize(str(tiny_model), tmp_path / "ckpt", recipe=recipe, calibration=str(text_file))
    export(tmp_path / "ckpt", "onnx", tmp_path / "bundle", activations="float32")
    # The first push breaks and so does the first run: neither may show in the figures.
    daemon.phone.faults.cut_push = [50_000]
    daemon.phone.faults.cut_output = [b'"event":"score"']
    arguments = ["measure", str(tmp_path / "bundle"), "--device", "android", "-o", str(tmp_path / "report")]
    done = CliRunner().invoke(app, [*arguments, "--new-tokens", "8", "--score-tokens", "32"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert daemon.phone.faults.cut_output == []
    summary = last_line(done.stdout)
    assert summary["execution"] == "emulated"
    assert summary["device"] == "android"
    assert summary["kl_from_quantized"]["value"] < 1e-6  # type: ignore[index]
    assert summary["greedy_matching"] == {"matching": 8, "compared": 8}
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["device"]["fingerprint"]["model"] == "Directory Phone"
    assert report["device"]["commands"][0][0].startswith("/data/local/tmp/boa-edge/runs/")
    assert "ld-linux-aarch64.so.1" in report["device"]["programs"]
    assert daemon.phone.running() == []
    absent = ["measure", str(tmp_path / "bundle"), "--device", "android:nobody", "-o", str(tmp_path / "none")]
    assert "no device nobody is attached" in str(CliRunner().invoke(app, absent).exception)
    assert not (tmp_path / "none").exists()


def test_the_self_test_says_what_works(daemon: Adbd) -> None:
    done = CliRunner().invoke(app, ["devices", "check", f"android:{daemon.serial}"], catch_exceptions=False)
    document = last_line(done.stdout)
    assert (done.exit_code, document["works"]) == (0, True), done.output
    steps = {step["name"]: step["detail"] for step in document["steps"]}  # type: ignore[attr-defined]
    assert list(steps) == ["reach", "files", "program", "model", "clock", "memory", "probes"]
    assert "16 tokens as on this machine" in steps["model"]
    assert "soc_manufacturer unavailable" in steps["probes"]
    done = CliRunner().invoke(app, ["devices", "clean", f"android:{daemon.serial}"], catch_exceptions=False)
    assert last_line(done.stdout)["removed"] == "/data/local/tmp/boa-edge"
    assert list(daemon.phone.data.iterdir()) == []


def test_the_self_test_of_a_device_that_is_not_right_names_the_step(daemon: Adbd) -> None:
    daemon.phone.program("uname", "echo armv7l")
    done = CliRunner().invoke(app, ["devices", "check", f"android:{daemon.serial}"], catch_exceptions=False)
    steps = last_line(done.stdout)["steps"]
    assert done.exit_code == 1
    assert [step["works"] for step in steps] == [False] + [None] * 6  # type: ignore[attr-defined]
    assert "its processor is armv7l" in steps[0]["detail"]  # type: ignore[index]
