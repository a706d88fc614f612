"""Files on a device, kept by content: what was pushed once is not pushed again.

A file stands under its SHA-256 only after its hash was checked there. Every use checks it again, so a store that was
damaged, emptied or half-written repairs itself. The least recently used files go when the store grows too large.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from devices.remote.hashing import hash_files
from devices.remote.ownership import STORED
from devices.remote.shell import DiskFullError, RemoteShell, ask, demand, last_line, transfer_limit, whole

_ATTEMPTS = 3
_NOTICEABLE = 20_000_000


class Store:
    """The directory `files` below `base` on a device.

    Attributes:
        pushed: bytes that this object has pushed.
    """

    def __init__(self, shell: RemoteShell, base: str, hasher: str | None, limit_bytes: int) -> None:
        self._shell = shell
        self._directory = f"{base}/files"
        self._hasher = hasher
        self._limit = limit_bytes
        self.pushed = 0

    def path(self, digest: str) -> str:
        """Where the file with this SHA-256 stands."""
        return f"{self._directory}/{digest}"

    def ensure(self, files: Mapping[str, Path]) -> None:
        """Bring every file (SHA-256 -> local path) there, checked.

        Raises:
            DiskFullError: there is no room even without what is not needed now.
            ConnectionLostError: the device went away; what was half-written is not taken for whole.
            BoaEdgeError: a file arrives damaged again and again, or the device refuses it.
        """
        sizes = {digest: source.stat().st_size for digest, source in files.items()}
        found = hash_files(self._shell, self._hasher, map(self.path, files), sum(sizes.values()))
        damaged = [digest for digest in files if found.get(self.path(digest), digest) != digest]
        if damaged:
            say(f"device {self._shell.name}: {len(damaged)} stored files were damaged and are pushed again")
            self._remove(map(self.path, damaged))
        absent = [digest for digest in files if found.get(self.path(digest)) != digest]
        self._make_room(sum(sizes[digest] for digest in absent), keep=set(files))
        for digest in absent:
            self.with_room(partial(self._push, files[digest], digest), files, sizes[digest])
        if files:
            ask(self._shell, f"touch -c {_words(map(self.path, files))}")

    def with_room(self, work: Callable[[], object], needed: Iterable[str], size: int) -> None:
        """Do `work`, and where the disk is full for it, once more without the files that are not `needed`.

        Raises:
            DiskFullError: that did not do; with the `size` that is needed, and what the device says is free.
        """
        try:
            work()
        except DiskFullError:
            self._make_room(self._limit, keep=set(needed))
            try:
                work()
            except DiskFullError:
                raise self._full(size) from None

    def _push(self, source: Path, digest: str) -> None:
        size = source.stat().st_size
        part = f"{self._directory}/.part-{digest}"
        if size >= _NOTICEABLE:
            say(f"device {self._shell.name}: pushing {source.name} ({size / 1e6:.0f} MB)")
        for _ in range(_ATTEMPTS):
            try:
                self._shell.send(source, part, transfer_limit(size))
                if self._adopt(part, digest, source):
                    self.pushed += size
                    return
            except DiskFullError:
                self._remove([part])
                raise
            self._remove([part])
        raise BoaEdgeError(
            f"{source.name} arrived damaged {_ATTEMPTS} times",
            where=f"device {self._shell.name}",
            fix="Use another cable or port, and check the device's storage",
        )

    def _adopt(self, part: str, digest: str, source: Path) -> bool:
        """Give a pushed file its name if it is what was to be pushed."""
        move = f"chmod 755 {shlex.quote(part)} && mv -f {shlex.quote(part)} {shlex.quote(self.path(digest))}"
        where = f"{source.name} cannot be stored"
        size = source.stat().st_size
        if self._hasher is None:
            if hash_files(self._shell, None, [part], size).get(part) != digest:
                return False
            demand(self._shell, move, where)
            return True
        check = f'set -- $({self._hasher} < {shlex.quote(part)})\n[ "$1" = {digest} ] || exit 44\n{move}'
        answer = ask(self._shell, check, timeout_s=transfer_limit(size))
        if answer.code not in (0, 44):
            raise BoaEdgeError(f"{where} ({last_line(answer.err)})", where=f"device {self._shell.name}")
        return answer.code == 0

    def _make_room(self, incoming: int, keep: set[str]) -> None:
        """Remove the least recently used files that are not in `keep` until `incoming` bytes fit below the limit."""
        listing = (
            f'cd {shlex.quote(self._directory)} && for f in *; do [ -f "$f" ] && stat -c \'%Y %s %n\' "$f"; done; true'
        )
        entries = []
        for line in ask(self._shell, listing).out.splitlines():
            words = line.split()
            at, size = map(whole, words[:2]) if len(words) == 3 else (None, None)
            if at is not None and size is not None:
                entries.append((at, size, words[2]))
        total = sum(size for _, size, _ in entries) + incoming
        gone = []
        for _, size, name in sorted(entries):
            if total <= self._limit:
                break
            if name not in keep and re.fullmatch(STORED, name):
                gone.append(self.path(name))
                total -= size
        self._remove(gone)

    def _remove(self, paths: Iterable[str]) -> None:
        words = _words(paths)
        if words:
            ask(self._shell, f"rm -f {words}")

    def _full(self, size: int) -> DiskFullError:
        df = ask(self._shell, f"df -k {shlex.quote(self._directory)}").out.split("\n")
        words = df[-1].split() or (df[-2].split() if len(df) > 1 else [])
        numbers = [number for number in map(whole, words) if number is not None]
        free = f"{numbers[2] / 1024:.0f} MiB are free" if len(numbers) >= 3 else "how much is free it does not say"
        return DiskFullError(
            f"the device's disk is full: {size / 1048576:.1f} MiB are to be stored, {free}",
            where=f"device {self._shell.name}",
            fix="Free some space on the device",
        )


def _words(paths: Iterable[str]) -> str:
    return " ".join(shlex.quote(str(path)) for path in paths)
