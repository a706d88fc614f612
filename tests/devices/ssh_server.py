"""A private sshd on the loopback interface whose sessions see an ARM64 board in a directory."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from adbd import Phone

from devices import tools
from devices.profile import load_profile

# The board's own files and its loader, as tests/devices/adbd.py replaces them; here in the session's shell.
_SESSION = r"""#!/bin/sh
export HOME={root}/home PATH={root}/bin:/usr/bin:/bin
cd "$HOME" || exit 1
[ -f {root}/broken ] && exit 255
command=$(printf '%s\n' "$SSH_ORIGINAL_COMMAND" | sed \
  -e 's#/proc/cpuinfo#{root}&#g' -e 's#/proc/meminfo#{root}&#g' -e 's#/proc/device-tree#{root}&#g' \
  -e 's# \([^ ]*/ld-linux-aarch64.so.1\) --library-path# {qemu} \1 --library-path#')
exec /bin/sh -c "$command"
"""
_CONFIGURATION = """ListenAddress 127.0.0.1
Port {port}
HostKey {keys}/host
AuthorizedKeysFile {keys}/authorized
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
ForceCommand {session}
"""


@dataclass
class Board:
    """A server that listens.

    Attributes:
        phone: its file system; `home` below its root is the user's home.
        settings: the profile's fields that reach it.
    """

    phone: Phone
    settings: dict[str, object]
    _command: list[str]
    _process: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Path:
        return self.phone.root / "home"

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(str(self.settings["port"])))) == 0:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        pytest.skip("sshd does not start here (as root it needs a mount namespace of its own)")

    def cut(self) -> None:
        """Every session breaks; what they started goes on."""
        assert self._process is not None
        for session in psutil.Process(self._process.pid).children():
            session.kill()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


@contextmanager
def ssh_board(directory: Path) -> Iterator[Board]:
    """A board that a key of its own opens. Skips the test where there is no sshd or it cannot run."""
    if tools.find(tools.SSHD) is None or tools.find(tools.SSH) is None or shutil.which("ssh-keygen") is None:
        pytest.skip("no OpenSSH server here; `make test` fetches it")
    cpu = load_profile("arm64").cpu
    assert cpu is not None
    phone = Phone(directory / "board", cpu, ())
    (phone.root / "home").mkdir()
    keys = directory / "keys"
    keys.mkdir()
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(keys / name)], check=True, timeout=60
        )
    shutil.copy(keys / "user.pub", keys / "authorized")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    session = directory / "session"
    qemu = f"{tools.require(tools.QEMU)} -cpu {cpu.qemu[0]} -L {phone.root}"
    session.write_text(_SESSION.format(root=phone.root, qemu=qemu), encoding="utf-8")
    session.chmod(0o755)
    configuration = directory / "sshd_config"
    configuration.write_text(_CONFIGURATION.format(port=port, keys=keys, session=session), encoding="utf-8")
    home = _client_home(directory, (keys / "host.pub").read_text(encoding="utf-8"), port)
    command = [str(tools.require(tools.SSHD)), "-D", "-e", "-f", str(configuration)]
    board = Board(
        phone,
        {"host": "127.0.0.1", "port": port, "identity": str(keys / "user")},
        _as_root(directory, command) if os.geteuid() == 0 else command,
    )
    board.start()
    patch = pytest.MonkeyPatch()
    # The client looks for its files where the system says the user lives; options in a wrapper point it elsewhere.
    patch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    try:
        yield board
    finally:
        patch.undo()
        board.stop()
        phone.kill()


def _client_home(directory: Path, host_key: str, port: int) -> Path:
    """A directory with an `ssh` that knows this host's key and nothing of the user's."""
    place = directory / "client"
    place.mkdir()
    (place / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}", encoding="utf-8")
    (place / "config").write_text(f"UserKnownHostsFile {place}/known_hosts\n", encoding="utf-8")
    wrapper = f'#!/bin/sh\nexec {shlex.quote(str(tools.require(tools.SSH)))} -F {place}/config "$@"\n'
    (place / "ssh").write_text(wrapper, encoding="utf-8")
    (place / "ssh").chmod(0o755)
    return place


def _as_root(directory: Path, command: list[str]) -> list[str]:
    """As root, sshd wants a user and a directory that its package would have made: they exist for it alone."""
    users = Path("/etc/passwd").read_text(encoding="utf-8").splitlines()
    users = [line for line in users if not line.startswith(("root:", "sshd:"))]
    users += ["root:x:0:0:root:/root:/bin/sh", "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin"]
    (directory / "passwd").write_text("\n".join(users) + "\n", encoding="utf-8")
    steps = f"mount --bind {directory}/passwd /etc/passwd && mount -t tmpfs none /run && mkdir -m 755 /run/sshd"
    return ["unshare", "-m", "sh", "-c", f"{steps} && exec {shlex.join(command)}"]
