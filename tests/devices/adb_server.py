"""A private adb server for tests, and phones attached to it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from adbd import Adbd, Phone

from devices import tools
from devices.profile import load_profile


def adb(*arguments: str, check: bool = True) -> str:
    """Run the real client against the private server."""
    command = [str(tools.require(tools.ADB)), *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=check)
    return done.stdout


@contextmanager
def private_server(home: Path) -> Iterator[None]:
    """A server with a port, a home and a log of its own, that looks for no emulators."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("tmp", "home", "cache"):
        (home / name).mkdir()
    patch = pytest.MonkeyPatch()
    patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    patch.setenv("ADB_LOCAL_TRANSPORT_MAX_PORT", "5554")
    patch.setenv("HOME", str(home / "home"))
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    for name in ("ADB_SERVER_SOCKET", "ANDROID_SERIAL", "ADB_VENDOR_KEYS"):
        patch.delenv(name, raising=False)
    command = [str(tools.require(tools.ADB)), "start-server"]
    # The server inherits this environment and outlives the command: it must not hold our pipes.
    environment = {**os.environ, "TMPDIR": str(home / "tmp")}
    quiet = subprocess.DEVNULL
    try:
        subprocess.run(command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, timeout=60, check=True)
        yield
    finally:
        adb("kill-server")
        patch.undo()


@contextmanager
def attached_phone(root: Path, cpu: str = "arm64") -> Iterator[Adbd]:
    """A phone that the server knows. Its CPU is that of an emulated profile."""
    profile = load_profile(cpu)
    assert profile.cpu is not None
    phone = Phone(root, profile.cpu, (str(tools.require(tools.QEMU)), "-cpu", profile.cpu.qemu[0]))
    daemon = Adbd(phone)
    try:
        adb("connect", daemon.serial)
        adb("-s", daemon.serial, "wait-for-device")
        yield daemon
    finally:
        daemon.stop()
        phone.kill()
        adb("disconnect", daemon.serial, check=False)
