"""Which device is meant, whether it can be used, and what the user has to do if not: through the real adb client."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from adb_server import adb, attached_phone
from adbd import Adbd
from phone_runs import Make, assert_right
from test_device_events import GENERATE

from boa_edge.errors import BoaEdgeError, UsageError
from devices import GenerateRequest, open_device
from devices.adb import Adb
from devices.profile import load_profile, read_profile
from devices.selftest import self_test

pytestmark = pytest.mark.usefixtures("server")


def test_several_devices_are_told_apart(daemon: Adbd, tmp_path: Path) -> None:
    with attached_phone(tmp_path / "other") as other:
        other.phone.properties["ro.product.model"] = "Other Phone"
        other.phone.boot()
        with pytest.raises(BoaEdgeError, match="2 devices are attached") as error:
            open_device("android").fingerprint()
        for serial in (daemon.serial, other.serial):
            assert f"{serial} Directory_Phone" in str(error.value)
        assert open_device(f"android:{other.serial}").fingerprint()["model"] == "Other Phone"
        assert open_device(f"android:{daemon.serial}").fingerprint()["model"] == "Directory Phone"
        status = open_device("android").status()
        assert not status.usable
        assert "--device android:" in " ".join(status.missing)


def test_a_network_device_is_connected_when_it_is_asked_for(daemon: Adbd) -> None:
    adb("disconnect", daemon.serial)
    assert open_device(f"android:{daemon.serial}").fingerprint()["machine"] == "aarch64"


@pytest.mark.parametrize(
    ("fault", "value", "found"),
    [
        ("authorized", False, "accept `Allow USB debugging`"),
        ("silent", True, "does not answer"),
        ("features", "cmd", "Android 7 or later"),
    ],
)
def test_a_device_that_cannot_be_used_says_what_to_do(
    daemon: Adbd, tiny_bundle: Path, fault: str, value: Any, found: str
) -> None:
    setattr(daemon.phone.faults, fault, value)
    adb("disconnect", daemon.serial)
    with pytest.raises(BoaEdgeError, match=found):
        open_device(f"android:{daemon.serial}").run(tiny_bundle, GenerateRequest((1,), 1))


def test_a_serial_with_a_space_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = """List of devices attached
adb-R5CT123-abcdef (2)._adb-tls-connect._tcp device product:x model:Pixel_8 device:y transport_id:3
emulator-5554          offline transport_id:1
0123 no permissions (missing udev rules?); see [http://developer.android.com]
"""
    done = subprocess.CompletedProcess([], 0, listed, "")
    adb_client = Adb(load_profile("android"))
    monkeypatch.setattr(adb_client, "call", lambda *_: done)
    assert [(each.serial, each.state) for each in adb_client.attached()] == [
        ("adb-R5CT123-abcdef (2)._adb-tls-connect._tcp", "device"),
        ("emulator-5554", "offline"),
        ("0123", "no permissions"),
    ]


def test_nothing_attached_says_how_to_attach(daemon: Adbd, tiny_bundle: Path) -> None:
    adb("disconnect", daemon.serial)
    with pytest.raises(BoaEdgeError, match=r"no device is attached. Plug the phone in"):
        open_device("android").run(tiny_bundle, GENERATE)
    with pytest.raises(BoaEdgeError, match=r"no device ABC is attached \(attached: none\)"):
        open_device("android:ABC").run(tiny_bundle, GENERATE)


def test_another_processor_is_refused(daemon: Adbd, tiny_bundle: Path) -> None:
    daemon.phone.program("uname", "echo x86_64")
    with pytest.raises(BoaEdgeError, match=r"its processor is x86_64.*Use a 64-bit ARM device"):
        open_device(f"android:{daemon.serial}").run(tiny_bundle, GENERATE)


@contextmanager
def no_server(free_port: int) -> Iterator[None]:
    """The user's own server would be at a port where nobody listens; only for the block, or its clean-up starts one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port))
        yield


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_an_adb_server_elsewhere(make: Make, free_port: int, tiny_bundle: Path) -> None:
    port = os.environ["ANDROID_ADB_SERVER_PORT"]
    with no_server(free_port):
        assert_right(make(server=f"127.0.0.1:{port}").run(tiny_bundle, GENERATE))
        with pytest.raises(BoaEdgeError, match=rf"adb server at 127\.0\.0\.1:{free_port} cannot be reached"):
            make(server=f"127.0.0.1:{free_port}").run(tiny_bundle, GENERATE)


def test_listing_devices_starts_no_server(free_port: int) -> None:
    with no_server(free_port):
        assert "no adb server is running" in " ".join(open_device("android").status().missing)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", free_port)) != 0


def test_a_device_that_does_not_answer_is_not_called_measured(daemon: Adbd) -> None:
    daemon.phone.faults.authorized = False
    adb("disconnect", daemon.serial)
    device = open_device(f"android:{daemon.serial}")
    assert device.status().execution is None
    with pytest.raises(BoaEdgeError, match="Allow USB debugging"):
        _ = device.execution
    result = self_test(device)
    assert (result.works, result.execution) == (False, None)
    daemon.phone.faults.authorized = True
    adb("disconnect", daemon.serial)
    assert device.status().execution == device.execution == "emulated"


def test_a_phone_is_never_called_emulated_nor_an_emulator_a_phone(daemon: Adbd, tmp_path: Path) -> None:
    assert open_device("android").execution == "emulated"
    daemon.phone.properties["ro.boot.qemu"] = ""
    daemon.phone.boot()
    assert open_device("android").execution == "measured"
    path = tmp_path / "own.toml"
    path.write_text('description = "x"\ntransport = "adb"\nemulated = true\n', encoding="utf-8")
    assert open_device(str(path)).execution == "emulated"


def test_a_runner_that_cannot_be_used_is_a_usage_error(make: Make, tmp_path: Path, tiny_bundle: Path) -> None:
    device = make()
    (tmp_path / "runner.sh").write_bytes(Path("/bin/sh").read_bytes())
    with pytest.raises(UsageError, match="not a program for ARM"):
        device.run(tiny_bundle, GENERATE)
    (tmp_path / "runner.sh").unlink()
    with pytest.raises(UsageError, match="is not a file"):
        device.run(tiny_bundle, GENERATE)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ('serial = "-s x"', "serial"),
        ('server = "nowhere"', "server"),
        ('directory = "relative"', "must be absolute"),
        ('directory = "/data/../etc"', "'..'"),
        ('host = "pi"', "'host' has no meaning"),
        ('runner_files = ["a"]', "runner_path"),
        ("serail = 1", "did you mean 'serial'"),
    ],
)
def test_a_wrong_adb_profile_is_one_line(tmp_path: Path, lines: str, found: str) -> None:
    path = tmp_path / "phone.toml"
    path.write_text(f'description = "x"\ntransport = "adb"\n{lines}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=found):
        read_profile(path)
