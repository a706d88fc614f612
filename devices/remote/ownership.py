"""Whether a directory on a device is ours: what is in it gets removed without asking."""

from __future__ import annotations

import shlex

from boa_edge.errors import BoaEdgeError
from boa_edge.visible import one_line
from devices.remote.shell import RemoteShell, ask

# Patterns, of a POSIX shell and of `re` alike, for a run's directory and for a stored file.
RUN, STORED = "[0-9a-f]" * 16, "[0-9a-f]" * 64
_OURS = f"files|runs|lock|runs/{RUN}|files/{STORED}|files/.part-{STORED}"


def check_ours(shell: RemoteShell, base: str) -> None:
    """Raises BoaEdgeError where the directory `base` holds anything that we would not have made."""
    script = f"""cd {shlex.quote(base)} 2>/dev/null || exit 0
for f in * .[!.]* ..?* runs/* runs/.[!.]* files/* files/.[!.]*; do
  [ -e "$f" ] || [ -L "$f" ] || continue
  case "$f" in {_OURS}) ;; *) printf '%s' "$f"; exit 45;; esac
done"""
    answer = ask(shell, script)
    if answer.code == 45:
        raise BoaEdgeError(
            f"{base} holds {one_line(answer.out, 80)}, which is not ours; we remove what is in our directory",
            where=f"device {shell.name}",
            fix="Name another `directory` in its profile, one that is not there yet",
        )
