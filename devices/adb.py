"""Android devices through the real `adb` client and the user's own adb server."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from boa_edge.errors import BoaEdgeError
from boa_edge.progress import say
from devices import tools
from devices.profile import Profile
from devices.remote.shell import (
    DiskFullError,
    ask,
    is_disk_full,
    last_line,
    lost,
    run_client,
)
from devices.remote.transport import Connection, RemoteTransport
from devices.transport import ConnectionLostError

_DIRECTORY = "/data/local/tmp/boa-edge"
_SERVER_PORT = 5037
_LIST_S = 30.0
_PROGRESS = re.compile(r"^\[\s*\d+%\] ")
# A serial, which may hold ` (2)`; a state; the rest.
_LISTED = re.compile(r"^(\S+(?: \(\d+\)\S*)?)\s+(no permissions|\S+)(.*)$")
_CONNECT_S = 5.0
_POLL_S = 0.5
_GONE = (
    "device offline",
    "not found",
    "couldn't read from device",
    "connect failed",
    "connection reset",
    "closed",
    "protocol fault",
    "failed to read",
    "no response",
    "broken pipe",
    "transport",
    "device still",
    "no devices",
    "unauthorized",
)
# Properties that the Android emulator sets, one name in older and one in newer releases; a phone has neither.
_EMULATOR_PROPERTIES = ("ro.kernel.qemu", "ro.boot.qemu")
_STATES = {
    "unauthorized": "does not trust this computer: unlock its screen and accept `Allow USB debugging`",
    "authorizing": "is asking whether to trust this computer: unlock its screen and accept `Allow USB debugging`",
    "offline": "does not answer (offline): plug it in again, or switch USB debugging off and on",
    "no permissions": "may not be used by this user: add the udev rules (Debian: apt-get install "
    "android-sdk-platform-tools-common) and plug it in again",
    "recovery": "is in recovery: restart it",
    "sideload": "is in recovery: restart it",
    "bootloader": "is in its bootloader: restart it",
    "connecting": "is still connecting: try again in a few seconds",
}


@dataclass(frozen=True)
class Attached:
    """A line of `adb devices -l`: serial, state (`device` where it can be used) and the rest."""

    serial: str
    state: str
    details: str

    def describe(self) -> str:
        """For a list in one line."""
        model = re.search(r"\bmodel:(\S+)", self.details)
        words = [self.serial, *([model[1]] if model else []), *([self.state] if self.state != "device" else [])]
        return " ".join(words)


class Adb:
    """The client, talking to one server."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def argv(self, *arguments: str) -> list[str]:
        """The client's command line."""
        server: list[str] = []
        if self._profile.server is not None:
            host, _, port = self._profile.server.rpartition(":")
            server = ["-H", host, "-P", port]
        return [str(tools.require(tools.ADB)), *server, *arguments]

    def call(self, *arguments: str, timeout_s: float = _LIST_S) -> subprocess.CompletedProcess[str]:
        """Run the client; its exit code is the caller's to judge. BoaEdgeError where it hangs or does not start."""
        command = self.argv(*arguments)
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BoaEdgeError(
                f"`adb {arguments[0]}` did not end within {timeout_s:g} s",
                where="adb",
                fix="Restart its server: adb kill-server; adb start-server",
            ) from None
        except OSError as error:
            raise BoaEdgeError(
                f"cannot be started ({error.strerror})", where=command[0], fix="Run `make setup`"
            ) from None

    def attached(self) -> list[Attached]:
        """Every device that the server knows. A local server is started if there is none."""
        done = self.call("devices", "-l")
        if done.returncode:
            said = last_line(done.stderr) or f"exit code {done.returncode}"
            raise BoaEdgeError(f"the adb server cannot be reached ({said})", where=f"device {self._profile.name}")
        found = []
        for line in done.stdout.splitlines():
            match = _LISTED.match(line)
            if match and not line.startswith(("List of devices", "*")):
                found.append(Attached(match[1], match[2], match[3].strip()))
        return found

    def server_address(self) -> tuple[str, int] | None:
        """Where the server listens; None where only the client can tell."""
        if self._profile.server is not None:
            host, _, port = self._profile.server.rpartition(":")
            return host, int(port)
        chosen = os.environ.get("ADB_SERVER_SOCKET")
        if chosen:
            match = re.fullmatch(r"tcp:(?:(.+):)?(\d+)", chosen)
            return (match[1] or "127.0.0.1", int(match[2])) if match else None
        port = os.environ.get("ANDROID_ADB_SERVER_PORT", "")
        host = os.environ.get("ANDROID_ADB_SERVER_ADDRESS", "127.0.0.1")
        return host, int(port) if port.isdigit() and int(port) < 65536 else _SERVER_PORT

    def server_runs(self) -> bool:
        """Whether a server listens; asked by connecting, because the client would start one."""
        address = self.server_address()
        if address is None:
            return True
        try:
            socket.create_connection(address, timeout=2).close()
        except OSError:
            return False
        return True


class AdbShell:
    """One device, by its serial. It is the `Connection` of devices/remote/transport.py."""

    def __init__(self, adb: Adb, profile: Profile, serial: str) -> None:
        self._adb = adb
        self._profile = profile
        self.serial = serial
        self.name = f"{profile.name} ({serial})" if serial not in profile.name else profile.name
        self.environment: Mapping[str, str] = dict(os.environ)

    def address(self) -> str:
        """Server and serial."""
        found = self._adb.server_address()
        if found is None:
            return f"{os.environ.get('ADB_SERVER_SOCKET')} {self.serial}"
        host, port = found
        return f"{'127.0.0.1' if host == 'localhost' else host}:{port} {self.serial}"

    def argv(self, script: str) -> list[str]:
        # No terminal: it would mix stderr into stdout and turn line ends into carriage returns.
        return self._adb.argv("-s", self.serial, "shell", "-n", "-T", script)

    def send(self, source: Path, path: str, timeout_s: float) -> None:
        self._copy(["push", str(source), path], timeout_s, source.name)

    def fetch(self, path: str, target: Path, timeout_s: float) -> None:
        self._copy(["pull", path, str(target)], timeout_s, path)

    def directory(self) -> str:
        return self._profile.directory or _DIRECTORY

    def emulated(self) -> bool:
        asked = "; ".join(f"getprop {name}" for name in _EMULATOR_PROPERTIES)
        return "1" in ask(self, asked).out.split()

    def check_shell(self) -> None:
        """BoaEdgeError where its shell has no exit codes and no stderr of its own (before Android 7)."""
        done = self._adb.call("-s", self.serial, "features")
        if done.returncode == 0 and "shell_v2" not in done.stdout.replace(",", " ").split():
            raise BoaEdgeError("its adb shell is too old: Android 7 or later is needed", where=f"device {self.name}")

    def recover(self) -> None:
        deadline = time.monotonic() + self._profile.reconnect_limit_s
        said = ""
        say(f"device {self.name}: waiting for it to come back")
        while True:
            if self._state() == "device":
                try:
                    ask(self, "true", timeout_s=10)
                    return
                except ConnectionLostError as error:
                    said = str(error)
            # A device on the network stays listed when its daemon is gone, and `connect` alone changes nothing then.
            if _on_network(self.serial):
                said = connect(self._adb, self.serial)
            if time.monotonic() > deadline:
                raise BoaEdgeError(
                    f"has not come back within {self._profile.reconnect_limit_s:g} s" + (f" ({said})" if said else ""),
                    where=f"device {self.name}",
                    fix="Check the cable or the network, and `adb devices`",
                )
            time.sleep(_POLL_S)

    def _state(self) -> str:
        try:
            done = self._adb.call("-s", self.serial, "get-state", timeout_s=10)
        except BoaEdgeError:
            return "unknown"
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    def _copy(self, arguments: list[str], timeout_s: float, what: str) -> None:
        done = run_client(self, self._adb.argv("-s", self.serial, *arguments), timeout_s)
        if done.returncode == 0:
            return
        said = _error_line(done.stdout + done.stderr)
        # A file's name must not be taken for what went wrong with it.
        words = re.sub(r"'[^']*'", "", said).lower()
        if is_disk_full(words):
            if arguments[0] == "pull":
                fix = "Free some space, or set TMPDIR to another place"
                raise BoaEdgeError("the disk of this machine is full", where=arguments[-1], fix=fix)
            raise DiskFullError(f"no room for {what}", where=f"device {self.name}")
        # Of a connection that breaks while it fetches a file, the client says nothing but how far it came.
        if not said or any(word in words for word in _GONE):
            raise lost(self, said or f"{what} came through in part")
        raise BoaEdgeError(f"adb {arguments[0]} of {what} failed ({said})", where=f"device {self.name}")


class AdbTransport(RemoteTransport):
    """A device that an adb server knows: the only one attached, or the one with the profile's serial."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self._adb = Adb(profile)

    def missing(self) -> tuple[str, ...]:
        if tools.find(tools.ADB) is None:
            return (f"{tools.ADB.programs[0]} ({tools.ADB.purpose}; Debian package {tools.ADB.package})",)
        return ()

    def _reachable(self) -> str | None:
        """To list devices must not leave a server running, so it is not started for that."""
        if self._profile.server is not None or self._adb.server_runs():
            return None
        return "no adb server is running; `adb start-server` or a run on this device starts it"

    def _connect(self) -> Connection:
        if self._profile.server is not None and not self._adb.server_runs():
            # Asked of a machine's own address, the client would start a server there.
            raise BoaEdgeError(
                f"the adb server at {self._profile.server} cannot be reached",
                where=f"device {self._profile.name}",
                fix="Start it there: adb -a -P PORT nodaemon server",
            )
        shell = AdbShell(self._adb, self._profile, self._choose())
        shell.check_shell()
        return shell

    def _choose(self) -> str:
        wanted, where = self._profile.serial, f"device {self._profile.name}"
        attached = self._adb.attached()
        if wanted is not None:
            found = next((item for item in attached if item.serial == wanted), None)
            if (found is None or found.state != "device") and _on_network(wanted):
                connect(self._adb, wanted)
                found = _wait(self._adb, wanted, _CONNECT_S)
            if found is None:
                known = "; ".join(item.describe() for item in attached) or "none"
                raise BoaEdgeError(f"no device {wanted} is attached (attached: {known})", where=where, fix=_HOW)
        else:
            usable = [item for item in attached if item.state == "device"] or attached
            if not usable:
                raise BoaEdgeError("no device is attached", where=where, fix=_HOW)
            if len(usable) > 1:
                known = "; ".join(item.describe() for item in attached)
                raise BoaEdgeError(
                    f"{len(usable)} devices are attached: {known}",
                    where=where,
                    fix=f"Choose one: --device {self._profile.name}:{usable[0].serial}, or `serial` in a profile",
                )
            found = usable[0]
        if found.state != "device":
            reason = _STATES.get(found.state, f"is in state {found.state!r}; it must be `device`")
            raise BoaEdgeError(f"{found.serial} {reason}", where=where)
        return found.serial


_HOW = "Plug the phone in with USB debugging on (Settings, Developer options), or connect it: adb connect ADDRESS"


def connect(adb: Adb, serial: str) -> str:
    """Reach a network device anew; what the client said, which does not tell whether it worked."""
    try:
        adb.call("disconnect", serial, timeout_s=15)
        return last_line(adb.call("connect", serial, timeout_s=15).stdout)
    except BoaEdgeError as error:
        return str(error)


def _wait(adb: Adb, serial: str, limit_s: float) -> Attached | None:
    deadline = time.monotonic() + limit_s
    while True:
        found = next((item for item in adb.attached() if item.serial == serial), None)
        if (found is not None and found.state == "device") or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_S / 2)


def _error_line(text: str) -> str:
    """What the client says went wrong; its count of files and bytes may follow."""
    lines = [line for line in text.splitlines() if not _PROGRESS.match(line)]
    errors = [line for line in lines if "error" in line.lower() or line.startswith("adb: ")]
    return last_line("\n".join(errors or lines))


def _on_network(serial: str) -> bool:
    """Whether a serial is an address: HOST:PORT."""
    return re.fullmatch(r".+:\d{1,5}", serial) is not None
