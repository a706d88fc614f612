"""A runner that the user built, such as one for Android's own C library, in place of ours."""

from __future__ import annotations

from pathlib import Path

from boa_edge.errors import UsageError
from devices.profile import Profile

_ARM = (183, 40)  # ELF's machine numbers, 64 and 32 bits


def own_files(profile: Profile, runner: Path) -> dict[str, Path]:
    """Name on the device -> local file of the runner and its libraries. UsageError where one cannot be used."""
    files: dict[str, Path] = {}
    for path in (runner, *profile.runner_files):
        where = f"device {profile.name}"
        if not path.is_file():
            raise UsageError(f"{path} is not a file", where=where, fix="Correct runner_path or runner_files")
        if path.name in files:
            raise UsageError(f"two files are named {path.name}", where=where, fix="Rename one of them")
        with path.open("rb") as stream:
            header = stream.read(20)
        if header[:4] == b"\x7fELF" and int.from_bytes(header[18:20], "little") not in _ARM:
            raise UsageError(f"{path} is not a program for ARM", where=where, fix="Build it for arm64-v8a")
        files[path.name] = path
    return files
