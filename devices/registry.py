"""The devices that are known, and how each kind is reached."""

from __future__ import annotations

from collections.abc import Callable

from boa_edge.errors import BoaEdgeError
from devices.adb import AdbTransport
from devices.contract import DeviceStatus
from devices.device import RunnerDevice
from devices.local import LocalTransport
from devices.profile import Profile, known_profiles, load_profile
from devices.qemu import QemuTransport
from devices.ssh import SshTransport
from devices.transport import Transport

TRANSPORTS: dict[str, Callable[[Profile], Transport]] = {
    "local": LocalTransport,
    "qemu": QemuTransport,
    "adb": AdbTransport,
    "ssh": SshTransport,
}


def open_device(name: str) -> RunnerDevice:
    """The device of that name, of `NAME:TARGET`, or of a profile file. UsageError where there is none."""
    profile = load_profile(name)
    return RunnerDevice(profile, TRANSPORTS[profile.transport](profile))


def list_devices() -> tuple[DeviceStatus, ...]:
    """Every device that comes with the package, `host` first, then the user's, and what keeps each from being used."""
    return tuple(_status(name) for name in known_profiles())


def _status(name: str) -> DeviceStatus:
    """A user's profile that is wrong must not hide the other devices."""
    try:
        return open_device(name).status()
    except BoaEdgeError as error:
        return DeviceStatus(name=name, description="", execution=None, usable=False, missing=(str(error),))
