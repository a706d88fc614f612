"""A device profile: one TOML file that says what the device is.

The same file chooses QEMU's CPU and writes the `/proc/cpuinfo` and `/sys` files that the emulated program reads, so
that the two cannot disagree: a library that dispatches by part number would otherwise run instructions the CPU lacks.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from boa_edge.errors import UsageError
from devices.paths import PROFILES

_FEATURE = r"^[a-z0-9_]+$"


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
        transport: `local` runs here natively; `qemu` runs here under emulation and needs `cpu`.
        silence_limit_s: seconds without an event after which a run counts as hung.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = Field(min_length=1, max_length=200)
    transport: Literal["local", "qemu"]
    silence_limit_s: float = Field(default=3600.0, gt=0)
    cpu: Cpu | None = None

    @model_validator(mode="after")
    def _cpu_belongs_to_emulation(self) -> Profile:
        if self.transport == "qemu" and self.cpu is None:
            raise ValueError("a qemu device needs a [cpu] table")
        if self.transport == "local" and self.cpu is not None:
            raise ValueError("a local device has the CPU it has; remove [cpu]")
        return self


def known_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    return tuple(sorted((path.stem for path in PROFILES.glob("*.toml")), key=lambda name: (name != "host", name)))


def load_profile(name_or_path: str) -> Profile:
    """The profile of that name, or of the user's own `.toml` file. UsageError where there is none or it is wrong."""
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        return read_profile(Path(name_or_path))
    known = known_profiles()
    if name_or_path not in known:
        close = difflib.get_close_matches(name_or_path, known, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown device {name_or_path!r}", fix=f"{hint}Known: {', '.join(known)}, or a .toml file")
    return read_profile(PROFILES / f"{name_or_path}.toml")


def read_profile(path: Path) -> Profile:
    """Parse and check one profile file."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the device profile cannot be read ({error.strerror})", where=path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the device profile is not valid TOML ({error})", where=path) from None
    if "name" in document:
        raise UsageError("field 'name' is not allowed: the file's name is the device's name", where=path)
    try:
        return Profile(name=path.stem, **document)
    except ValidationError as error:
        raise UsageError(_explain(error), where=path) from None


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
