"""A small adb daemon for tests: an ARM64 phone in a directory, that fails on command.

The real `adb` client talks to it. Commands run on this machine in a sandbox directory that stands for the phone's file
system: what they name below `/data/local/tmp`, `/sys` and parts of `/proc` is replaced by the sandbox's own, and the
ARM64 loader is put under QEMU, because without root nothing else makes the kernel run an ARM64 program. The phone's
processes outlive a lost connection, as they may on a real one.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from devices.fake_files import fake_files
from devices.profile import Cpu

_VERSION = 0x01000001
_MAX_DATA = 1 << 18
_HOME = "/data/local/tmp"
_MOVED = re.compile(
    "|".join((_HOME, "/sys/", "/proc/(?:cpuinfo|meminfo|sys/kernel/random/boot_id|device-tree)", "/etc/os-release"))
)
_LOADER = re.compile(r"(?<=\s)(\S+/ld-linux-aarch64\.so\.1)(?=\s+--library-path)")
PROPERTIES = {
    "ro.product.manufacturer": "boa-edge",
    "ro.product.model": "Directory Phone",
    "ro.soc.model": "QEMU",
    "ro.boot.qemu": "1",
    "ro.build.version.release": "14",
    "ro.build.version.sdk": "34",
    "ro.product.cpu.abilist": "arm64-v8a",
}
BATTERY = "Current Battery Service state:\n  AC powered: false\n  USB powered: true\n  level: 81\n  temperature: 264\n"


@dataclass
class Faults:
    """What goes wrong next. Each list is used up from its front, one item for each push or run.

    Attributes:
        cut_push: the connection breaks after so many bytes of a file.
        damage_push: a byte of the file is changed, this many times.
        cut_pull, damage_pull: the same of a file that is fetched.
        cut_output: the connection breaks when a command has printed this.
        quota: bytes of files that the disk takes, None for all.
        authorized: whether the user has accepted this computer's key.
        silent: connections are accepted and never answered.
        features: of the daemon, for the client.
    """

    cut_push: list[int] = field(default_factory=list)
    damage_push: int = 0
    cut_pull: list[int] = field(default_factory=list)
    damage_pull: int = 0
    cut_output: list[bytes] = field(default_factory=list)
    quota: int | None = None
    authorized: bool = True
    silent: bool = False
    features: str = "shell_v2,cmd"


class Phone:
    """The file system, the programs and the processes.

    Attributes:
        root: the sandbox directory.
        commands: every shell command that arrived, as the client sent it.
        pushed: path of every file that arrived whole.
    """

    def __init__(self, root: Path, cpu: Cpu, emulate: tuple[str, ...]) -> None:
        self.root = root
        self.faults = Faults()
        self.commands: list[str] = []
        self.pushed: list[str] = []
        self.processes: set[int] = set()
        self._emulate = (*emulate, "-L", str(root))
        self.properties = dict(PROPERTIES)
        self._shell = "/bin/sh"
        self._path = f"{root}/bin:/usr/bin:/bin"
        self.data.mkdir(parents=True)
        for name, content in fake_files(cpu).items():
            self.write(name, content)
        self.write("proc/meminfo", "MemTotal:        8000000 kB\nMemAvailable:    4000000 kB\n")
        for core in range(cpu.cores):
            self.write(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor", "schedutil\n")
            self.write(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", f"{cpu.max_mhz * 1000}\n")
        self.write("sys/class/thermal/thermal_zone0/type", "cpu\n")
        self.write("sys/class/thermal/thermal_zone0/temp", "41500\n")
        self.program("uname", 'case "$1" in -m) echo aarch64;; -r) echo 5.10.0-phone;; *) echo Linux;; esac')
        self.program("getprop", f'cat "{root}/properties/$1" 2>/dev/null || echo')
        self.dumpsys(thermal=0)
        self.boot()

    @property
    def data(self) -> Path:
        """`/data/local/tmp` as it really stands."""
        return self.root / _HOME.lstrip("/")

    @property
    def store(self) -> Path:
        """Where the product keeps its files."""
        return self.data / "boa-edge" / "files"

    def boot(self) -> None:
        """A new boot: nothing runs."""
        self.kill()
        fields = secrets.token_hex(16)
        self.write("proc/sys/kernel/random/boot_id", f"{fields[:8]}-{fields[8:12]}-{fields[12:16]}-{fields[16:20]}\n")
        for name, value in self.properties.items():
            self.write(f"properties/{name}", f"{value}\n")

    def dumpsys(self, thermal: int) -> None:
        """What Android's services answer."""
        answers = f'battery) printf %s "{BATTERY}";; thermalservice) echo "Thermal Status: {thermal}";;'
        self.program("dumpsys", f'case "$1" in {answers} *) exit 1;; esac')

    def write(self, name: str, content: str) -> None:
        """A file of the sandbox."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")

    def program(self, name: str, script: str) -> None:
        """A program on the phone's PATH, before this machine's own."""
        self.write(f"bin/{name}", f"#!/bin/sh\n{script}\n")
        (self.root / "bin" / name).chmod(0o755)

    def userland(self, shell: Path, multiplexer: Path) -> None:
        """Android's own shell and its one program for all commands, and nothing of this machine's."""
        listed = subprocess.run([str(multiplexer)], capture_output=True, text=True, check=True, timeout=60)
        for name in listed.stdout.split():
            if not (self.root / "bin" / name).exists():
                self.program(name, f'exec {multiplexer} {name} "$@"')
        self._shell = str(shell)
        self._path = f"{self.root}/bin"

    def real(self, path: str) -> Path | None:
        """Where a path of the phone stands; None for one that its shell user may not write."""
        return Path(f"{self.root}{path}") if path.startswith(_HOME) and ".." not in path else None

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """A shell command in a process group of its own."""
        self.commands.append(command)
        text = _MOVED.sub(lambda found: f"{self.root}{found[0]}", command)
        text = _LOADER.sub(rf"{' '.join(self._emulate)} \1", text)
        process = subprocess.Popen(
            [self._shell, "-c", text],
            cwd=self.root,
            env={"PATH": self._path, "HOME": "/"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.processes.add(process.pid)
        return process

    def kill(self) -> None:
        """End every process."""
        for pid in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.processes.clear()

    def running(self) -> list[int]:
        """Process ids that work in a run's directory."""
        found = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(f"{self.data}/boa-edge/runs"):
                    found.append(int(link.parent.name))
        return found

    def full(self, more: int) -> bool:
        """Whether `more` bytes exceed what the disk takes."""
        if self.faults.quota is None:
            return False
        used = sum(path.stat().st_size for path in self.data.rglob("*") if path.is_file() and not path.is_symlink())
        return used + more > self.faults.quota


class Adbd:
    """The daemon on a port of the loopback interface; it keeps its port over restarts."""

    def __init__(self, phone: Phone) -> None:
        self.phone = phone
        self._listener: socket.socket | None = None
        self._port = 0
        self._connections: set[_Connection] = set()
        self.start()

    @property
    def serial(self) -> str:
        """How adb names it."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen()
        self._port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def stop(self) -> None:
        """As if the daemon died: connections break, what runs on the phone goes on."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.cut()

    def cut(self) -> None:
        """As if the cable was pulled: every connection breaks, the daemon goes on."""
        for connection in list(self._connections):
            connection.close()

    def reboot(self, *, wipe: bool = False) -> None:
        """Everything ends, another boot begins, with `/data/local/tmp` empty if `wipe`."""
        self.stop()
        self.phone.boot()
        if wipe:
            shutil.rmtree(self.phone.data)
            self.phone.data.mkdir()
        self.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            connection = _Connection(peer, self)
            self._connections.add(connection)
            threading.Thread(target=connection.serve, daemon=True).start()

    def forget(self, connection: _Connection) -> None:
        """A connection that has ended."""
        self._connections.discard(connection)


class _Connection:
    """One client server's connection: packets in, streams by their ids."""

    def __init__(self, peer: socket.socket, daemon: Adbd) -> None:
        self._peer = peer
        self.daemon = daemon
        self._sending = threading.Lock()
        self._streams: dict[int, _Stream] = {}
        self._next = 1
        self.max_data = _MAX_DATA

    def serve(self) -> None:
        try:
            while True:
                command, arg0, arg1, length, _, _ = struct.unpack("<4s5I", self._receive(24))
                self._handle(command, arg0, arg1, self._receive(length))
        except (OSError, EOFError):
            pass
        finally:
            self.close()
            for stream in list(self._streams.values()):
                stream.end()
            self.daemon.forget(self)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()

    def send(self, command: bytes, arg0: int, arg1: int, payload: bytes = b"") -> None:
        magic = int.from_bytes(command, "little") ^ 0xFFFFFFFF
        head = struct.pack("<4s5I", command, arg0, arg1, len(payload), sum(payload) & 0xFFFFFFFF, magic)
        with self._sending:
            self._peer.sendall(head + payload)

    def drop(self, stream: _Stream) -> None:
        self._streams.pop(stream.local, None)

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            chunk = self._peer.recv(count - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)

    def _handle(self, command: bytes, arg0: int, arg1: int, payload: bytes) -> None:
        faults = self.daemon.phone.faults
        if faults.silent:
            return
        if command in (b"CNXN", b"AUTH") and not faults.authorized:
            if command == b"CNXN" or arg0 == 2:  # whoever shows a key (3) waits for its owner's consent
                self.send(b"AUTH", 1, 0, secrets.token_bytes(20))
        elif command == b"CNXN":
            self.max_data = min(self.max_data, arg1)
            banner = f"device::ro.product.name=directory;ro.product.model=Directory_Phone;features={faults.features}"
            self.send(b"CNXN", _VERSION, _MAX_DATA, banner.encode())
        elif command == b"OPEN":
            self._open(arg0, payload.rstrip(b"\0").decode())
        elif arg1 not in self._streams:
            if command != b"CLSE":
                self.send(b"CLSE", 0, arg0)
        elif command == b"OKAY":
            self._streams[arg1].acknowledged.set()
        elif command == b"WRTE":
            self._streams[arg1].feed(payload)
            self.send(b"OKAY", arg1, arg0)
        elif command == b"CLSE":
            self._streams[arg1].end()

    def _open(self, remote: int, service: str) -> None:
        name, _, rest = service.partition(":")
        serve: Callable[[_Stream], None]
        if name == "shell" or name.startswith("shell,v2"):
            serve = _Shell(rest, "v2" in name.split(",")).serve
        elif name == "sync":
            serve = _serve_sync
        else:
            self.send(b"CLSE", 0, remote)
            return
        stream = _Stream(self, self._next, remote)
        self._next += 1
        self._streams[stream.local] = stream
        self.send(b"OKAY", stream.local, remote)
        threading.Thread(target=stream.run, args=(serve,), daemon=True).start()


class _Stream:
    """A two-way stream of bytes with one write at a time under way."""

    def __init__(self, connection: _Connection, local: int, remote: int) -> None:
        self.connection = connection
        self.phone = connection.daemon.phone
        self.local, self.remote = local, remote
        self.acknowledged = threading.Event()
        self._writing = threading.Lock()
        self._arrived = threading.Condition()
        self._buffer = bytearray()
        self._ended = False

    def run(self, serve: Callable[[_Stream], None]) -> None:
        with contextlib.suppress(OSError, EOFError):
            serve(self)
            self.connection.send(b"CLSE", self.local, self.remote)
        self.end()

    def feed(self, data: bytes) -> None:
        with self._arrived:
            self._buffer += data
            self._arrived.notify_all()

    def end(self) -> None:
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()
        self.acknowledged.set()
        self.connection.drop(self)

    def read(self, count: int) -> bytes:
        with self._arrived:
            self._arrived.wait_for(lambda: self._ended or len(self._buffer) >= count)
            if len(self._buffer) < count:
                raise EOFError
            data = bytes(self._buffer[:count])
            del self._buffer[:count]
        return data

    def write(self, data: bytes) -> None:
        with self._writing:
            for start in range(0, len(data), self.connection.max_data):
                self.acknowledged.clear()
                if self._ended:
                    raise EOFError
                self.connection.send(b"WRTE", self.local, self.remote, data[start : start + self.connection.max_data])
                self.acknowledged.wait()


class _Shell:
    """A command; with the second version of the protocol its streams stay apart and its exit code arrives."""

    def __init__(self, command: str, v2: bool) -> None:
        self._command, self._v2 = command, v2

    def serve(self, stream: _Stream) -> None:
        process = stream.phone.start(self._command)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.close()
        pumps = [
            threading.Thread(target=self._pump, args=(stream, pipe, kind), daemon=True)
            for pipe, kind in ((process.stdout, 1), (process.stderr, 2))
        ]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        code = process.wait()
        if self._v2:
            stream.write(struct.pack("<BIB", 3, 1, code if code >= 0 else 128 - code))

    def _pump(self, stream: _Stream, pipe: object, kind: int) -> None:
        faults = stream.phone.faults
        assert hasattr(pipe, "fileno")
        seen = b""
        with contextlib.suppress(OSError, EOFError):
            while data := os.read(pipe.fileno(), 1 << 16):
                start, seen = len(seen), seen + data
                cut = bool(faults.cut_output) and faults.cut_output[0] in seen
                if cut:  # there and not at the end of what was read, or a quick command's whole answer gets through
                    text = faults.cut_output.pop(0)
                    data = seen[start : seen.index(text) + len(text)]
                stream.write((struct.pack("<BI", kind, len(data)) if self._v2 else b"") + data)
                if cut:
                    stream.connection.close()
                    break
        assert hasattr(pipe, "close")
        pipe.close()


def _serve_sync(stream: _Stream) -> None:
    """File transfer, first version of the protocol."""
    while True:
        kind, length = struct.unpack("<4sI", stream.read(8))
        if kind == b"QUIT":
            return
        text = stream.read(length).decode()
        if kind == b"STAT":
            path = stream.phone.real(text)
            found = path.stat() if path is not None and path.exists() else None
            numbers = (found.st_mode, found.st_size, int(found.st_mtime)) if found else (0, 0, 0)
            stream.write(struct.pack("<4s3I", b"STAT", *numbers))
        elif kind == b"SEND":
            _receive_file(stream, text.rpartition(",")[0])
        elif kind == b"RECV":
            _send_file(stream, text)
        else:
            _fail(stream, f"unknown request {kind!r}")


def _fail(stream: _Stream, message: str) -> None:
    data = message.encode()
    stream.write(struct.pack("<4sI", b"FAIL", len(data)) + data)


def _receive_file(stream: _Stream, name: str) -> None:
    phone = stream.phone
    path = phone.real(name)
    cut = phone.faults.cut_push.pop(0) if phone.faults.cut_push else None
    content = bytearray()
    while True:
        kind, length = struct.unpack("<4sI", stream.read(8))
        if kind == b"DONE":
            break
        content += stream.read(length)
        if cut is not None and len(content) >= cut:
            if path is not None:  # the real daemon writes as it goes
                path.write_bytes(content[:cut])
            stream.connection.close()
            raise EOFError
    if path is None:
        return _fail(stream, "couldn't create file: Permission denied")
    if phone.full(len(content)):
        return _fail(stream, "couldn't write file: No space left on device")
    if phone.faults.damage_push and content:
        phone.faults.damage_push -= 1
        content[len(content) // 2] ^= 1
    try:
        path.write_bytes(content)
    except OSError as error:
        return _fail(stream, f"couldn't create file: {error.strerror}")
    phone.pushed.append(name)
    stream.write(struct.pack("<4sI", b"OKAY", 0))


def _send_file(stream: _Stream, name: str) -> None:
    path = stream.phone.real(name)
    if path is None or not path.is_file():
        return _fail(stream, "open failed: No such file or directory")
    faults, content = stream.phone.faults, bytearray(path.read_bytes())
    cut = faults.cut_pull.pop(0) if faults.cut_pull else None
    if faults.damage_pull and content:
        faults.damage_pull -= 1
        content[len(content) // 2] ^= 1
    for start in range(0, len(content), 1 << 16):
        data = content[start : start + (1 << 16)][: None if cut is None else max(0, cut - start)]
        stream.write(struct.pack("<4sI", b"DATA", len(data)) + data)
        if cut is not None and cut <= start + len(data):
            stream.connection.close()
            raise EOFError
    stream.write(struct.pack("<4sI", b"DONE", 0))
