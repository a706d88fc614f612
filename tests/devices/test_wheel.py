"""Libraries out of wheels: whole or not at all, and one clear line where they cannot be had."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from boa_edge.errors import BoaEdgeError
from devices import binaries, executorch_library, onnxruntime_library
from devices.binaries import RUNNERS
from devices.wheel import Wheel

EM_AARCH64 = 183


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BOA_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def arriving(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes] | bytes) -> list[Path]:
    """What pip brings, in the place of a download; where it was put, once for each time it was asked for."""
    asked: list[Path] = []

    def download(self: Wheel, directory: Path) -> Path:
        asked.append(directory)
        path = directory / "package-1-cp311-cp311-manylinux_2_28_aarch64.whl"
        if isinstance(members, bytes):
            path.write_bytes(members)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, content)
        return path

    monkeypatch.setattr(Wheel, "_download", download)
    return asked


def whole() -> dict[str, bytes]:
    return {f"executorch/lib/{name}": name.encode() for name in executorch_library.WHEEL.names}


def test_the_libraries_are_taken_out_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = executorch_library.WHEEL
    asked = arriving(
        monkeypatch, whole() | {"executorch/data/lib/libexecutorch.so": b"another", "executorch/x.py": b""}
    )
    assert wheel.arm64() is None
    found = wheel.fetch_arm64()
    assert {name: path.read_bytes() for name, path in found.items()} == {name: name.encode() for name in wheel.names}
    assert wheel.fetch_arm64() == found == wheel.arm64()
    assert len(asked) == 1


@pytest.mark.parametrize("what", ["lacks one", "torn", "no zip"])
def test_a_damaged_wheel_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    members = whole()
    members.pop("executorch/lib/libexecutorch_threadpool.so")
    arriving(monkeypatch, {"lacks one": members, "torn": b"PK\3\4" + bytes(100), "no zip": b"hello"}[what])
    with pytest.raises(BoaEdgeError, match=r"0 files for libexecutorch_threadpool.so|wheel is damaged") as caught:
        executorch_library.WHEEL.fetch_arm64()
    assert "\n" not in str(caught.value)
    assert executorch_library.WHEEL.arm64() is None
    assert not [path for path in (cache / "executorch").iterdir() if path.name != ".lock"]


def test_without_the_package_there_is_one_line() -> None:
    wheel = Wheel("boa-edge-no-such-package", "Nothing", ("a.so",), lambda path: None)
    for ask in (wheel.version, wheel.host, wheel.arm64, wheel.fetch_arm64):
        with pytest.raises(BoaEdgeError, match="boa-edge-no-such-package is not installed"):
            ask()


def test_a_device_lacks_only_what_its_bundle_needs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arriving(monkeypatch, whole())
    executorch_library.WHEEL.fetch_arm64()
    assert not [lack for lack in binaries.missing("aarch64", "executorch") if "librar" in lack]
    assert [lack for lack in binaries.missing("aarch64", "onnx") if "librar" in lack] == [
        f"the ARM64 library of onnxruntime {onnxruntime_library.version()}"
    ]
    assert [lack for lack in binaries.missing("aarch64") if "librar" in lack]


@pytest.mark.parametrize("runtime", list(RUNNERS))
def test_the_fetched_libraries_are_of_arm64_and_the_hosts_are_not(runtime: str) -> None:
    wheel = RUNNERS[runtime].wheel
    fetched, installed = wheel.arm64(), wheel.host()
    assert installed is not None
    if fetched is None:
        pytest.skip("no ARM64 libraries here; `make setup` fetches them")
    for name in wheel.names:
        assert fetched[name].read_bytes()[:4] == b"\x7fELF"
        assert int.from_bytes(fetched[name].read_bytes()[18:20], "little") == EM_AARCH64
        assert fetched[name].read_bytes() != installed[name].read_bytes()
