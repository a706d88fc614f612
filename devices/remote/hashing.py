"""SHA-256 of files on a device: by a program there, else by fetching them back."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path

from boa_edge.errors import BoaEdgeError
from boa_edge.files import sha256_file
from devices.remote.shell import RemoteShell, ask, last_line, lost, transfer_limit, whole

_PROGRAMS = ("sha256sum", "toybox sha256sum", "busybox sha256sum")
_LINE = re.compile(r"^([0-9]{1,9}) ([0-9a-f]{64})\b")
# SHA-256 of nothing.
_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def find_hasher(shell: RemoteShell) -> str | None:
    """The program there that hashes as it should, None where there is none."""
    tries = "\n".join(f'echo "$({program} </dev/null 2>/dev/null)"' for program in _PROGRAMS)
    answers = ask(shell, tries).out.split("\n")
    right = (program for program, answer in zip(_PROGRAMS, answers, strict=False) if answer.startswith(_EMPTY))
    return next(right, None)


def hash_files(shell: RemoteShell, hasher: str | None, paths: Iterable[str], total: int) -> dict[str, str]:
    """Path -> hex SHA-256 of those among `paths` that are files there; `total`: bytes expected, for the time limit."""
    wanted = list(paths)
    if not wanted:
        return {}
    if hasher is None:
        return {path: digest for path in wanted if (digest := _fetch_and_hash(shell, path)) is not None}
    # By number and through stdin: the programs print names each in their own way.
    lines = [
        f"[ -f {shlex.quote(path)} ] && echo {i} $({hasher} < {shlex.quote(path)})" for i, path in enumerate(wanted)
    ]
    answer = ask(shell, "\n".join([*lines, "true"]), timeout_s=transfer_limit(total))
    found = {}
    for line in answer.out.splitlines():
        match = _LINE.match(line)
        if match and int(match[1]) < len(wanted):
            found[wanted[int(match[1])]] = match[2]
    return found


def _fetch_and_hash(shell: RemoteShell, path: str) -> str | None:
    size = ask(shell, f"[ -f {shlex.quote(path)} ] && wc -c < {shlex.quote(path)}")
    if not size:
        return None
    with tempfile.TemporaryDirectory(prefix="boa-edge-") as directory:
        target = Path(directory) / "back"
        shell.fetch(path, target, transfer_limit(whole(size.out.strip()) or 0))
        return sha256_file(target)


def fetch_checked(shell: RemoteShell, hasher: str | None, path: str, target: Path) -> bool:
    """Fetch a file and hold it against its size and hash there; False where there is no such file.

    A device without a hasher is asked for the file twice.

    Raises ConnectionLostError where what arrived is not what stands there.
    """
    quoted = shlex.quote(path)
    answer = ask(shell, f"[ -f {quoted} ] || exit 44; wc -c < {quoted}")
    if answer.code == 44:
        return False
    count = whole(answer.out.strip())
    if not answer or count is None:
        raise BoaEdgeError(f"{path} cannot be read there ({last_line(answer.err)})", where=f"device {shell.name}")
    shell.fetch(path, target, transfer_limit(count))
    if target.stat().st_size != count:
        raise lost(shell, f"{target.stat().st_size} of {count} bytes of {path} arrived")
    there = hash_files(shell, hasher, [path], count).get(path)
    if there != sha256_file(target):
        raise lost(shell, f"{path} did not arrive as it stands there")
    return True
