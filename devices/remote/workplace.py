"""A directory on a device for one run."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from boa_edge.errors import BoaEdgeError
from boa_edge.files import sha256_file
from devices.binaries import LOADER
from devices.contract import GaugeSample
from devices.process import Listener, Outcome, run_lines
from devices.remote import gauge
from devices.remote.hashing import fetch_checked
from devices.remote.marker import TIMED_OUT, EndMarker, as_signal
from devices.remote.ownership import RUN
from devices.remote.probes import read_state
from devices.remote.shell import RemoteShell, ask, demand, lost, transfer_limit
from devices.remote.store import Store
from devices.transport import ConnectionLostError

_GAUGE = "gauge"
_ENVIRONMENT = "LC_ALL=C ORT_DISABLE_TELEMETRY=1"

# Ends what works in a run's directory: the recorded process, and others, because a program may have children.
_END = """end_run() {
  d=$(cd "$1" 2>/dev/null && pwd -P) || return 0
  if [ -f "$d/pid" ]; then
    read p < "$d/pid"
    [ "$(readlink /proc/$p/cwd 2>/dev/null)" = "$d" ] && kill -9 "$p" 2>/dev/null
  fi
  ls -l /proc/[0-9]*/cwd 2>/dev/null | while read -r l; do
    case "$l" in *" -> $d") l=${l%/cwd -> *}; kill -9 "${l##*/}" 2>/dev/null;; esac
  done
  return 0
}
"""


def sweep(shell: RemoteShell, base: str) -> None:
    """End and remove what runs left that were cut off. Call with the device's lock held."""
    runs, files = f"{shlex.quote(f'{base}/runs')}/{RUN}", shlex.quote(f"{base}/files")
    script = f'{_END}for d in {runs}; do [ -d "$d" ] && end_run "$d"; done\n'
    demand(shell, f"{script}rm -rf {runs} {files}/.part-*", "left-over runs cannot be removed")


class RemoteWorkplace:
    """Files that are pushed are collected and brought there together, when the first run needs them."""

    def __init__(self, shell: RemoteShell, base: str, store: Store, hasher: str | None, time_limit_s: float) -> None:
        self._shell = shell
        self._store = store
        self._hasher = hasher
        self._time_limit = int(time_limit_s)
        self.directory = f"{base}/runs/{secrets.token_hex(8)}"
        self._waiting: dict[str, tuple[str, Path]] = {}
        self._names: set[str] = set()
        self._battery: str | None = None
        self._local = tempfile.TemporaryDirectory(prefix="boa-edge-")
        demand(shell, f"mkdir {shlex.quote(self.directory)}", "a run's directory cannot be made")

    def push(self, source: Path, name: str, *, executable: bool = False) -> None:
        self._waiting[name] = (sha256_file(source), source)

    def write(self, content: bytes, name: str) -> None:
        digest = hashlib.sha256(content).hexdigest()
        path = Path(self._local.name) / digest
        try:
            path.write_bytes(content)
        except OSError as error:
            problem = f"cannot be written on this machine ({error.strerror})"
            raise BoaEdgeError(problem, where=path, fix="Free some space, or set TMPDIR to another place") from None
        self._waiting[name] = (digest, path)

    def path(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def command(self, program: str, arguments: Sequence[str]) -> tuple[str, ...]:
        if LOADER in self._names or LOADER in self._waiting:
            return (self.path(LOADER), "--library-path", self.directory, self.path(program), *arguments)
        return (self.path(program), *arguments)

    def run(self, program: str, arguments: Sequence[str], on_line: Listener, silence_limit_s: float) -> Outcome:
        self.deploy()
        marker = EndMarker()
        script = self._script(self.command(program, arguments), marker)
        try:
            outcome = run_lines(
                self._shell.argv(script), self._shell.environment, marker.filter(on_line), silence_limit_s
            )
        finally:
            if marker.code is None:
                self._end_process()
        if outcome.problem is not None:
            return outcome
        if marker.code is None:
            raise lost(self._shell, "\n".join(outcome.stderr))
        if marker.code == TIMED_OUT:
            limit = f"it ran for longer than {self._time_limit} s on the device"
            return Outcome(None, outcome.stderr, limit, "Raise time_limit_s in the device's profile")
        return Outcome(as_signal(marker.code), outcome.stderr)

    def instructions(self) -> tuple[int, ...] | None:
        return None

    def state(self) -> dict[str, Any]:
        return read_state(self._shell)

    def watch(self, battery: str) -> None:
        self._battery = battery

    def gauge(self) -> tuple[GaugeSample, ...]:
        path = self.pull(_GAUGE)
        return gauge.read_samples(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ()

    def pull(self, name: str) -> Path:
        target = Path(self._local.name) / f"pulled-{name}"
        fetch_checked(self._shell, self._hasher, self.path(name), target)
        return target

    def deploy(self) -> None:
        """Bring what was pushed and written into the directory: linked out of the store, else copied."""
        if not self._waiting:
            return
        needed = dict(self._waiting.values())
        self._store.ensure(needed)
        lines = [f"cd {shlex.quote(self.directory)} || exit 1"]
        for name, (digest, _) in self._waiting.items():
            stored, here = shlex.quote(self._store.path(digest)), shlex.quote(name)
            lines.append(
                f"ln {stored} {here} 2>/dev/null || {{ cp {stored} {here} && cmp -s {stored} {here}; }} || exit 1"
            )
        script, failure = "\n".join(lines), "files cannot be put into the run's directory"
        copied = sum(path.stat().st_size for path in needed.values())  # at most: what is linked takes no time
        limit = transfer_limit(copied)
        self._store.with_room(lambda: demand(self._shell, script, failure, timeout_s=limit), needed, copied)
        self._names |= set(self._waiting)
        self._waiting.clear()

    def remove(self) -> None:
        """Leave nothing of the run on the device; what cannot be reached now is swept by the next run."""
        self._local.cleanup()
        with contextlib.suppress(ConnectionLostError):
            here = shlex.quote(self.directory)
            ask(self._shell, f"{_END}end_run {here}; rm -rf {here}")

    def _script(self, command: Sequence[str], marker: EndMarker) -> str:
        """The run on the device: its process id recorded, ended by a watcher there when its time is up.

        Its children are ended with it: one that holds its output would keep the shell from ending.
        The watcher looks once a second, so that it is gone a second after the run whatever happens to it.
        """
        program = shlex.join(command)
        if LOADER in self._names:
            start = f'env -i PATH="$PATH" {_ENVIRONMENT} {program}'
        else:  # a program of the system's own linker may need the system's variables
            start = f"env {_ENVIRONMENT} LD_LIBRARY_PATH={shlex.quote(self.directory)} {program}"
        # What waits works elsewhere: whatever works in the directory is taken for the program.
        late = shlex.quote(self.path("timed-out"))
        look = "" if self._battery is None else gauge.sampling(self._battery, shlex.quote(self.path(_GAUGE)))
        return f"""{_END}cd {shlex.quote(self.directory)} || exit 1
{start} </dev/null &
p=$!
echo $p > pid
( cd /; n={self._time_limit}
while [ $n -gt 0 ] && kill -0 $p 2>/dev/null; do sleep 1; n=$((n-1)); {look}done
kill -0 $p 2>/dev/null && {{ : > {late}; kill -9 $p; }} ) </dev/null >/dev/null 2>&1 &
w=$!
wait $p
c=$?
kill $w 2>/dev/null
[ -f timed-out ] && c={TIMED_OUT}
cd /
end_run {shlex.quote(self.directory)} 2>/dev/null
{marker.print_code("$c")}"""

    def _end_process(self) -> None:
        """End the program there: stopping the client does not. Left to the next run's sweep where nobody answers."""
        with contextlib.suppress(ConnectionLostError):
            ask(self._shell, f"{_END}end_run {shlex.quote(self.directory)}", timeout_s=20)
