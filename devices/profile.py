"""A device profile: one TOML file that says what the device is.

The same file chooses QEMU's CPU and writes the `/proc/cpuinfo` and `/sys` files that the emulated program reads, so
that the two cannot disagree: a library that dispatches by part number would otherwise run instructions the CPU lacks.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from boa_edge.errors import UsageError
from devices.paths import PROFILES

_FEATURE = r"^[a-z0-9_]+$"
# No leading dash: these become arguments of client programs.
# A phone that is found on the network anew may bear ` (2)`.
_SERIAL = r"^[A-Za-z0-9_\[][A-Za-z0-9._:%\[\]-]*( \([0-9]+\)[A-Za-z0-9._-]*)?$"
_HOST = r"^[A-Za-z0-9_][A-Za-z0-9._@:%\[\]-]*$"
_SERVER = r"^[A-Za-z0-9][A-Za-z0-9.-]*:[0-9]{1,5}$"
_DIRECTORY = r"^/?[A-Za-z0-9._][A-Za-z0-9._/-]*$"

# What may stand in a profile besides what every device has.
_REMOTE = (
    "emulated",
    "directory",
    "runner_path",
    "runner_files",
    "time_limit_s",
    "reconnect_limit_s",
    "start_below_c",
    "cool_down_limit_s",
    "store_limit_mb",
)
_FIELDS: dict[str, tuple[str, ...]] = {
    "local": (),
    "qemu": ("cpu",),
    "adb": ("serial", "server", *_REMOTE),
    "ssh": ("host", "port", "identity", *_REMOTE),
}
_COMMON = ("name", "description", "transport", "silence_limit_s")
# The field that a name's part after its first colon fills in: `android:SERIAL`, `ssh:USER@HOST`.
_TARGETS = {"adb": "serial", "ssh": "host"}


class Cpu(BaseModel):
    """The emulated CPU.

    Attributes:
        qemu: values for QEMU's `-cpu`, best first; the first that the installed QEMU knows is used.
        cores: how many the device shows, all alike.
        implementer, part, variant, revision: the fields of the main ID register.
        min_mhz, max_mhz: what the frequency files say; nothing is clocked by it.
        features: names as Linux prints them in `/proc/cpuinfo`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    qemu: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,=+-]+$")], ...] = Field(min_length=1)
    cores: int = Field(ge=1, le=64)
    implementer: int = Field(ge=0, le=0xFF)
    part: int = Field(ge=0, le=0xFFF)
    variant: int = Field(ge=0, le=0xF)
    revision: int = Field(ge=0, le=0xF)
    min_mhz: int = Field(gt=0, le=10_000)
    max_mhz: int = Field(gt=0, le=10_000)
    features: tuple[Annotated[str, Field(pattern=_FEATURE)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _frequencies_in_order(self) -> Cpu:
        if self.min_mhz > self.max_mhz:
            raise ValueError(f"min_mhz {self.min_mhz} is above max_mhz {self.max_mhz}")
        return self

    @property
    def midr(self) -> int:
        """The main ID register (architecture field 0xf: described by ID registers)."""
        return self.implementer << 24 | self.variant << 20 | 0xF << 16 | self.part << 4 | self.revision


class Profile(BaseModel):
    """What a device is and how it is reached.

    Attributes:
        name: the file's stem.
        description: one line for `boa-edge devices`.
        transport: `local` runs here natively; `qemu` runs here under emulation and needs `cpu`; `adb` is an Android
            device; `ssh` is anything with an OpenSSH server.
        silence_limit_s: seconds without an event after which a run counts as hung.
        serial: adb: of the device, as `adb devices` shows it; without it the only one that is attached.
        server: adb: HOST:PORT of an adb server elsewhere; without it the user's own.
        host: ssh: HOST, USER@HOST or a name in the user's ssh configuration.
        port, identity: ssh: where they differ from what the user's ssh configuration says; a path is relative to the
            profile's file.
        emulated: adb, ssh: the device is no real hardware, so that nothing of it counts as measured.
        directory: adb, ssh: where our files stand on the device; ssh: relative to the home directory or absolute.
        runner_path, runner_files: adb, ssh: a runner of the user's own instead of ours, and the libraries it needs;
            the paths are relative to the profile's file.
        time_limit_s: adb, ssh: seconds after which the device itself ends a run, reached or not.
        reconnect_limit_s: adb, ssh: seconds to wait for a device that went away.
        start_below_c: adb, ssh: degrees Celsius of the battery, else of the hottest zone, that the device has to have
            come down to before a generation is timed; without it nobody waits.
        cool_down_limit_s: adb, ssh: seconds to wait for that.
        store_limit_mb: adb, ssh: MiB of files that may stay on the device.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = Field(min_length=1, max_length=200)
    transport: Literal["local", "qemu", "adb", "ssh"]
    silence_limit_s: float = Field(default=3600.0, gt=0)
    cpu: Cpu | None = None
    serial: str | None = Field(default=None, pattern=_SERIAL, max_length=200)
    server: str | None = Field(default=None, pattern=_SERVER)
    host: str | None = Field(default=None, pattern=_HOST, max_length=255)
    port: int | None = Field(default=None, ge=1, le=65535)
    identity: Path | None = None
    emulated: bool = False
    directory: str | None = Field(default=None, pattern=_DIRECTORY, max_length=200)
    runner_path: Path | None = None
    runner_files: tuple[Path, ...] = ()
    time_limit_s: float = Field(default=6 * 3600.0, ge=1, le=30 * 24 * 3600)
    reconnect_limit_s: float = Field(default=90.0, ge=1, le=3600)
    start_below_c: float | None = Field(default=None, gt=0, le=120)
    cool_down_limit_s: float = Field(default=900.0, ge=0, le=24 * 3600)
    store_limit_mb: int = Field(default=4096, ge=1)

    @model_validator(mode="after")
    def _fields_belong_to_the_transport(self) -> Profile:
        if self.transport == "qemu" and self.cpu is None:
            raise ValueError("a qemu device needs a [cpu] table")
        if self.transport == "local" and self.cpu is not None:
            raise ValueError("a local device has the CPU it has; remove [cpu]")
        allowed = {*_COMMON, *_FIELDS[self.transport]}
        for field in sorted(self.model_fields_set - allowed):
            raise ValueError(f"'{field}' has no meaning for transport {self.transport!r}; remove it")
        if self.runner_files and self.runner_path is None:
            raise ValueError("'runner_files' belong to a runner of your own: set 'runner_path' too")
        if self.directory is not None and ".." in self.directory.split("/"):
            raise ValueError("'directory' must not contain '..'")
        if self.transport == "adb" and self.directory is not None and not self.directory.startswith("/"):
            raise ValueError("'directory' must be absolute on an adb device")
        return self


def user_profiles() -> Path:
    """The directory of the user's own profiles; it need not exist."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "boa-edge" / "devices"


def known_profiles() -> dict[str, Path]:
    """Name -> file: ours, `host` first, then the user's; a file of the user's wins over ours of the same name."""
    ours = sorted(PROFILES.glob("*.toml"), key=lambda path: (path.stem != "host", path.stem))
    return {path.stem: path for path in (*ours, *sorted(user_profiles().glob("*.toml")))}


def load_profile(name_or_path: str) -> Profile:
    """The profile of that name, of `NAME:TARGET` (a serial, a host), or of a file. UsageError if there is none."""
    known = known_profiles()
    name, colon, target = name_or_path.partition(":")
    if colon and name in known:
        return _aimed(read_profile(known[name]), name_or_path, target)
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        return read_profile(Path(name_or_path))
    if name_or_path not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown device {name_or_path!r}", fix=f"{hint}Known: {', '.join(known)}, or a .toml file")
    return read_profile(known[name_or_path])


def _aimed(profile: Profile, name: str, target: str) -> Profile:
    field = _TARGETS.get(profile.transport)
    if field is None:
        raise UsageError(f"{profile.name!r} takes nothing after a colon", where=f"device {name}")
    given = profile.model_dump(exclude_unset=True) | {"name": name, field: target}
    try:
        return Profile(**given)
    except ValidationError as error:
        raise UsageError(_explain(error), where=f"device {name}") from None


def read_profile(path: Path) -> Profile:
    """Parse and check one profile file."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the device profile cannot be read ({error.strerror})", where=path) from None
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers too long to be read
        raise UsageError(f"the device profile is not valid TOML ({error})", where=path) from None
    if "name" in document:
        raise UsageError("field 'name' is not allowed: the file's name is the device's name", where=path)
    try:
        return _with_paths(Profile(name=path.stem, **document), path.absolute().parent)
    except ValidationError as error:
        raise UsageError(_explain(error), where=path) from None
    except RuntimeError as error:  # of `~` or `~user`
        raise UsageError(f"a path cannot be read: {error}", where=path) from None


def _with_paths(profile: Profile, base: Path) -> Profile:
    """Relative paths are relative to the profile's own directory; `~` is the user's home."""

    def absolute(path: Path) -> Path:
        return base / path.expanduser()

    changes: dict[str, Any] = {}
    if profile.runner_path is not None:
        changes["runner_path"] = absolute(profile.runner_path)
        changes["runner_files"] = tuple(map(absolute, profile.runner_files))
    if profile.identity is not None:
        changes["identity"] = absolute(profile.identity)
    return profile.model_copy(update=changes) if changes else profile


def _explain(error: ValidationError) -> str:
    """The first problem, with the key it is about and, for an unknown key, the nearest known one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *table, key = first["loc"]
        fields = Cpu.model_fields if table else Profile.model_fields
        known = [field for field in fields if field != "name"]
        close = difflib.get_close_matches(str(key), known, n=1)
        return f"unknown key '{where}'" + (f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}")
    return f"'{where}': {first['msg']}" if where else str(first["msg"]).removeprefix("Value error, ")
