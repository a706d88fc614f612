"""The devices that are known, and how each kind is reached."""

from __future__ import annotations

from collections.abc import Callable

from devices.contract import DeviceStatus
from devices.device import RunnerDevice
from devices.local import LocalTransport
from devices.profile import Profile, known_profiles, load_profile
from devices.qemu import QemuTransport
from devices.transport import Transport

TRANSPORTS: dict[str, Callable[[Profile], Transport]] = {
    "local": LocalTransport,
    "qemu": QemuTransport,
}


def open_device(name: str) -> RunnerDevice:
    """The device of that name, or of a profile file of the user's. UsageError where there is none."""
    profile = load_profile(name)
    return RunnerDevice(profile, TRANSPORTS[profile.transport](profile))


def list_devices() -> tuple[DeviceStatus, ...]:
    """Every device that comes with the package, `host` first, and what keeps it from being used now."""
    return tuple(open_device(name).status() for name in known_profiles())
