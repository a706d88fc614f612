"""The command line: what a script that calls it can rely on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from boa_edge.cli import main
from toolchain.calibration import DATASETS
from toolchain.loading import load_source
from toolchain.methods import METHODS

SMALL = {
    "method": "boa",
    "weights": {"bits": 4, "group_size": 32, "symmetric": True},
    "calibration": {"sequences": 6, "sequence_length": 64, "held_out_sequences": 2},
}


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def call(*arguments: object, cwd: Path | None = None) -> Done:
    """The command in this process: what `boa-edge ARGUMENTS` does, without importing torch anew."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["boa-edge", *map(str, arguments)])
        if cwd is not None:
            patch.chdir(cwd)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def result(done: Done) -> dict[str, object]:
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(document, dict)
    return document


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.mark.parametrize("command", ["quantize", "export", "measure", "evaluate", "devices", "run"])
def test_every_command_explains_itself(command: str) -> None:
    done = call(command, "--help")
    assert done.returncode == 0
    assert f"boa-edge {command}" in done.stdout
    assert len(done.stdout) > 100


def test_the_installed_command_ends_with_one_json_document() -> None:
    command = [str(Path(sys.executable).with_name("boa-edge")), "devices"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    names = [device["name"] for device in json.loads(done.stdout.splitlines()[-1])["devices"]]
    assert names[0] == "host"
    assert {"android", "arm64", "arm64-a53", "arm64-i8mm", "ssh"} <= set(names)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "nowhere", "-o", "x"], 2, "error: nowhere: no such model."),
        (["quantize", "default", "--recipe", "w9-boa", "-o", "x"], 2, "weights.bits"),
        (["quantize", "default"], 2, "--output"),
        (["export", "nowhere", "-o", "x"], 1, "error: nowhere: no such quantized checkpoint."),
        (["export", "nowhere", "--runtime", "onx", "-o", "x"], 2, "'onnx'"),
        (["measure", "nowhere", "-o", "x"], 1, "error: nowhere"),
        (["run", "--device", "arm65", "-o", "x"], 2, "arm64"),
        (["run", "--runtime", "onx", "-o", "x"], 2, "Accepted: executorch, onnx"),
        (["evaluate", "default", "--text", "nowhere.txt"], 1, "error: nowhere.txt: no such text file."),
        (["quantize", "", "-o", "x"], 2, "error: an argument is empty. Is a variable not set?"),
        (["run", "--model", " ", "-o", "x"], 2, "error: --model: an argument is empty."),
        (["quantize", "default", "-o", ""], 2, "error: -o: an argument is empty."),
        (["quantize", "default", "--output="], 2, "error: --output: an argument is empty."),
        (["compare", "a", "b", "--fail-on", ""], 2, "error: --fail-on: an argument is empty."),
        (["quantize", "default", "-o", "/", "--overwrite"], 2, "error: /: "),
        (["quantize", "default", "-o", "x", "--spill", "x/y"], 2, "(--spill: x/y)"),
        (["quantize", "default", "-o", "x", "--spill", "/proc/x"], 2, "Choose another --spill"),
        (["quantize", "default", "-o", "x", "--compare", "rtn,rtm"], 2, "unknown method 'rtm'. Accepted: rtn, gptq"),
        (["run", "--model", ".", "-o", "/proc/foo/bar"], 2, "/proc/foo/bar: nothing can be written there"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_a_wrong_request_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    done = call(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_what_there_is() -> None:
    text = " ".join(call("quantize", "--help").stdout.split())
    assert f"({', '.join(METHODS)})".replace(" ", "") in text.replace(" ", "")
    assert f"({', '.join(DATASETS)})" in text
    assert "[a8[t|r|s|u]][kv8[t]]" in text.replace(" ", "")


def test_no_stage_replaces_what_it_reads(tiny_model: Path, text_file: Path, recipe_file: Path, tmp_path: Path) -> None:
    model, home = tmp_path / "model", tmp_path / "home"
    shutil.copytree(tiny_model, model)
    home.mkdir()
    text = shutil.copy(text_file, home / "text.txt")
    asked = ["--recipe", recipe_file, "--calibration", text, "--overwrite"]
    for output in (model, home, tmp_path):
        done = call("quantize", model, *asked, "-o", output)
        assert (done.returncode, "is never replaced" in done.stderr) == (2, True), done.stderr
    assert sorted(os.listdir(model)) == sorted(os.listdir(tiny_model))
    assert os.listdir(home) == ["text.txt"]
    ckpt, bundle = tmp_path / "ckpt", tmp_path / "bundle"
    for _ in range(2):
        result(call("quantize", model, *asked, "-o", ckpt, "--compare", "rtn,rtn,boa"))
        result(call("export", ckpt, "--activations", "float32", "-o", bundle, "--overwrite"))
    rows = json.loads((ckpt / "provenance.json").read_text())["comparison"]
    assert [row["method"] for row in rows] == ["rtn", "boa"]
    assert call("export", ckpt, "-o", ckpt, "--overwrite").returncode == 2
    assert call("measure", bundle, "-o", bundle, "--overwrite").returncode == 2
    assert call("quantize", bundle, "-o", home, "--overwrite").returncode == 2
    assert (ckpt / "model.safetensors").exists()
    assert (bundle / "manifest.json").exists()


def test_run_refuses_directories_that_it_did_not_make(tiny_model: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out" / "bundle"
    theirs.mkdir(parents=True)
    (theirs / "notes.txt").write_text("x")
    done = call("run", "--model", tiny_model, "--device", "host", "-o", tmp_path / "out")
    assert (done.returncode, "bundle: exists already" in done.stderr) == (2, True), done.stderr
    shutil.copytree(tiny_model, tmp_path / "other" / "report")
    done = call("run", "--model", tmp_path / "other" / "report", "--device", "host", "-o", tmp_path / "other")
    assert (done.returncode, "(the model: " in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(("command", "kept"), [("quantize", True), ("export", False)])
def test_an_interrupt_is_one_line(command: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("toolchain.quantize.quantize", interrupt)
    monkeypatch.setattr("exporters.export", interrupt)
    done = call(command, "default", "-o", tmp_path / "x")
    more = " Finished blocks are kept, and the same command goes on from there." if kept else ""
    assert (done.returncode, done.stderr) == (130, f"error: interrupted.{more}\n")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "a", "WORLD_SIZE": "2"}, "error: the variable RANK: 'a' is no whole number."),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "error: the variable WORLD_SIZE: 'two' is no whole number."),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "error: the variable RANK: 2, where WORLD_SIZE is 2."),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "error: RANK is set: the processes do not find each other"),
    ],
)
def test_variables_of_torchrun_that_make_no_sense(
    variables: dict[str, str], message: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = call("quantize", tiny_model, "-o", tmp_path / "x")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert "unset RANK and WORLD_SIZE" in done.stderr


def test_the_stages_in_a_row_on_the_host(tiny_model: Path, text_file: Path, recipe_file: Path, tmp_path: Path) -> None:
    ckpt, bundle, report = tmp_path / "ckpt", tmp_path / "bundle", tmp_path / "report"
    made = result(call("quantize", tiny_model, "--recipe", recipe_file, "--calibration", text_file, "-o", ckpt))
    assert made["recipe"] == "w4g32-boa"
    exported = result(call("export", ckpt, "--runtime", "onnx", "--activations", "float32", "-o", bundle))
    assert exported["quantized_linears"] == 15  # seven per block, and the head
    measured = result(call("measure", bundle, "--device", "host", "-o", report))
    assert (report / "report.html").stat().st_size > 10_000
    assert json.loads((report / "report.json").read_text())["schema_version"] == 1
    figures = {}
    options = ["--text", text_file, "--reference", tiny_model, "--tokens", 2048, "--seq-len", 64]
    for subject in (tiny_model, ckpt, bundle):
        figures[subject.name] = result(call("evaluate", subject, *options))
    assert figures[tiny_model.name]["kl"] == pytest.approx(0, abs=1e-6)
    assert figures["ckpt"]["kl"] > 0
    # Lowering changes nothing: with float32 activations the bundle is the checkpoint to float rounding.
    assert figures["bundle"]["kl"] == pytest.approx(figures["ckpt"]["kl"], rel=1e-3)
    assert figures["bundle"]["perplexity"] == pytest.approx(figures["ckpt"]["perplexity"], rel=1e-4)
    assert measured


def test_run_keeps_finished_stages_of_the_same_request(
    tiny_model: Path, text_file: Path, recipe_file: Path, tmp_path: Path
) -> None:
    arguments = ["run", "--model", tiny_model, "--recipe", recipe_file, "--calibration", text_file]
    arguments += ["--device", "host", "-o", tmp_path / "out"]
    result(call(*arguments))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.safetensors")}
    assert len(made) == 3
    again = call(*arguments)
    result(again)
    assert "made by the same request, kept" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.safetensors")} == made
    checkpoint = tmp_path / "out" / "checkpoint"
    comparison = json.loads((checkpoint / "provenance.json").read_text())["comparison"]
    assert [row["method"] for row in comparison] == ["rtn", "gptq", "boa"]
    # What somebody has put in a stage's place is not that stage's.
    other = ["quantize", tiny_model, "--recipe", "w4g32-rtn", "--calibration", text_file, "-o", checkpoint]
    result(call(*other, "--overwrite"))
    third = call(*arguments)
    result(third)
    assert "made by the same request, kept" not in third.stderr
    comparison = json.loads((checkpoint / "provenance.json").read_text())["comparison"]
    assert [row["method"] for row in comparison] == ["rtn", "gptq", "boa"]


@pytest.mark.slow
def test_the_default_model_is_what_the_readme_says() -> None:
    spec = load_source("default").spec
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.layers, spec.tied_embeddings) == (9, 3, 64, 30, True)
