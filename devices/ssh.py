"""Anything with an OpenSSH server, such as an ARM board, through the real `ssh` client and the user's configuration."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from boa_edge.visible import one_line
from devices import tools
from devices.profile import Profile
from devices.remote.marker import EndMarker
from devices.remote.shell import DiskFullError, ask, demand, is_disk_full, last_line, lost, run_client
from devices.remote.transport import Connection, RemoteTransport
from devices.transport import ConnectionLostError

_DIRECTORY = ".cache/boa-edge/device"
_POLL_S = 1.0
_CONNECT_S = 15
# The client exits with this for its own failures.
_CLIENT_FAILED = 255
# How the client names what the user has to settle; everything else may be a network that comes back.
_REFUSALS = {
    "host key verification failed": "Check the host's key, then accept it once: ssh {host}",
    "permission denied": "Let it in without a password: ssh-copy-id {host}",
    "could not resolve hostname": "Correct the host's name",
    "no such identity": "Correct `identity` in the profile",
    "bad configuration option": "Correct your ssh configuration",
}


class SshShell:
    """One host. It is the `Connection` of devices/remote/transport.py."""

    def __init__(self, profile: Profile, host: str) -> None:
        self._profile = profile
        self._host = host
        self.name = profile.name if host in profile.name else f"{profile.name} ({host})"
        self.environment: Mapping[str, str] = dict(os.environ)
        # One connection for all commands.
        self._control = _short_directory()
        self._home: str | None = None

    def address(self) -> str:
        """USER@HOST:PORT, as the client reads them out of the user's configuration."""
        done = run_client(self, [*self._client(), "-G", self._host], _CONNECT_S)
        found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
        user, _, host = self._host.rpartition("@")
        port = found.get("port", self._profile.port or 22)
        return f"{found.get('user', user)}@{found.get('hostname', host)}:{port}"

    def argv(self, script: str) -> list[str]:
        # -n: stdin is not read. The user's login shell may be any; the script is for a POSIX one.
        return [*self._client(), "-n", self._host, f"exec sh -c {shlex.quote(script)}"]

    def send(self, source: Path, path: str, timeout_s: float) -> None:
        marker = EndMarker()
        script = marker.wrap(f"cat > {shlex.quote(path)}")
        command = [*self._client(), self._host, f"exec sh -c {shlex.quote(script)}"]
        done = run_client(self, command, timeout_s, source)
        marker.split(done.stdout)
        said = last_line(done.stderr)
        if marker.code is None:
            raise lost(self, said)
        if is_disk_full(said):
            raise DiskFullError(f"no room for {source.name}", where=f"device {self.name}")
        if marker.code != 0:
            raise BoaEdgeError(f"{source.name} cannot be written there ({said})", where=f"device {self.name}")

    def fetch(self, path: str, target: Path, timeout_s: float) -> None:
        command = [*self._client(), "-n", self._host, f"exec cat {shlex.quote(path)}"]
        done = run_client(self, command, timeout_s, target=target)
        if done.returncode == _CLIENT_FAILED:
            raise lost(self, done.stderr)
        if done.returncode:
            raise BoaEdgeError(f"{path} cannot be read ({last_line(done.stderr)})", where=f"device {self.name}")

    def directory(self) -> str:
        wanted = self._profile.directory or _DIRECTORY
        if wanted.startswith("/"):
            return wanted
        if self._home is None:
            self._home = demand(self, 'cd && printf %s "$PWD"', "the home directory cannot be found").strip()
        if not self._home.startswith("/") or "'" in self._home or "\n" in self._home:
            raise BoaEdgeError(
                f"its home directory is {self._home!r}",
                where=f"device {self.name}",
                fix="Set `directory` in the profile",
            )
        return f"{self._home.rstrip('/')}/{wanted}"

    def emulated(self) -> bool:
        """QEMU's generic board says so in its device tree; the user emulator in its processor's name."""
        script = (
            "cat /proc/device-tree/compatible /proc/device-tree/model 2>/dev/null; grep -i -m1 qemu /proc/cpuinfo; true"
        )
        said = ask(self, script).out.lower()
        return "dummy-virt" in said or "qemu" in said

    def greet(self) -> None:
        """Ask for anything. BoaEdgeError says what the user has to settle where the client itself is refused."""
        done = run_client(self, self.argv("echo boa-edge"), _CONNECT_S + 15.0)
        before, found, _ = done.stdout.rpartition("boa-edge\n")
        if done.returncode == 0 and found:
            if before.strip():
                raise BoaEdgeError(
                    f"its shell prints {one_line(before.strip(), 60)!r} before every command, into every file",
                    where=f"device {self.name}",
                    fix="Let its start files (~/.bashrc and the like) print nothing where there is no terminal",
                )
            return
        said = last_line(done.stderr) or f"exit code {done.returncode}"
        for phrase, fix in _REFUSALS.items():
            if phrase in done.stderr.lower():
                raise BoaEdgeError(said, where=f"device {self.name}", fix=fix.format(host=self._host))
        raise BoaEdgeError(
            f"does not answer ({said})",
            where=f"device {self.name}",
            fix=f"Check that this works: ssh {self._host} true",
        )

    def recover(self) -> None:
        deadline = time.monotonic() + self._profile.reconnect_limit_s
        say(f"device {self.name}: waiting for it to come back")
        while True:
            # A shared connection that broke would be used again.
            run_client(self, [*self._client(), "-O", "exit", self._host], 15)
            try:
                return self.greet()
            except (BoaEdgeError, ConnectionLostError) as error:
                said = str(error)
            if time.monotonic() > deadline:
                limit = f"{self._profile.reconnect_limit_s:g} s"
                raise BoaEdgeError(f"has not come back within {limit} ({said})", where=f"device {self.name}")
            time.sleep(_POLL_S)

    def _client(self) -> list[str]:
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(_CONNECT_S),
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "4",
            "ControlMaster": "auto",
            "ControlPath": f"{self._control.name}/s",
            "ControlPersist": "15",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "LogLevel": "ERROR",
        }
        command = [str(tools.require(tools.SSH)), "-T"]
        command += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        if self._profile.port is not None:
            command += ["-p", str(self._profile.port)]
        if self._profile.identity is not None:
            command += ["-i", str(self._profile.identity), "-o", "IdentitiesOnly=yes"]
        return command


def _short_directory() -> tempfile.TemporaryDirectory[str]:
    """For a socket: its path must be short, and the client reads spaces and `%` in it in its own way."""
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = re.fullmatch(r"/[A-Za-z0-9/._-]{1,48}", own) and os.access(own, os.W_OK | os.X_OK)
    try:
        return tempfile.TemporaryDirectory(prefix="boa-ssh-", dir=own if usable else "/tmp")
    except OSError as error:
        fix = "Let this user write there, or set XDG_RUNTIME_DIR to a directory with a short path"
        raise BoaEdgeError(f"no socket can be made there ({error.strerror})", where="/tmp", fix=fix) from None


class SshTransport(RemoteTransport):
    """The profile's host."""

    def missing(self) -> tuple[str, ...]:
        if tools.find(tools.SSH) is None:
            return (f"{tools.SSH.programs[0]} ({tools.SSH.purpose}; Debian package {tools.SSH.package})",)
        return ()

    def _reachable(self) -> str | None:
        if self._profile.host is None:
            return f"no host is named: --device {self._profile.name}:USER@HOST, or a profile with `host`"
        return None

    def _connect(self) -> Connection:
        reason = self._reachable()
        if reason is not None or self._profile.host is None:
            raise BoaEdgeError(reason or "no host", where=f"device {self._profile.name}")
        shell = SshShell(self._profile, self._profile.host)
        shell.greet()
        return shell
