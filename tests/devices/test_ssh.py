"""A board behind a real sshd: the same laws as for a phone, and what only ssh can get wrong."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ssh_server import Board, ssh_board
from test_device_events import GENERATE, script

from boa_edge.errors import BoaEdgeError, UsageError
from devices import ScoreRequest, open_device, tools
from devices.contract import Event
from devices.device import RunnerDevice
from devices.profile import Profile, load_profile
from devices.ssh import SshShell

EVENTS = script(GENERATE)
Make = Callable[..., RunnerDevice]


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    with ssh_board(tmp_path) as board:
        yield board


@pytest.fixture
def make(tmp_path: Path, board: Board, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A device of a profile that reaches the board, with a script for a runner where one is given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(runner: str | None = None, **fields: Any) -> RunnerDevice:
        settings = {"description": "a board", "transport": "ssh", "reconnect_limit_s": 5} | board.settings | fields
        if runner is not None:
            (tmp_path / "runner.sh").write_text(f'#!/bin/sh\nhere=$(dirname "$0")\n{runner}\n', encoding="utf-8")
            (tmp_path / "events").write_text("".join(json.dumps(event) + "\n" for event in EVENTS), encoding="utf-8")
            settings |= {"runner_path": "runner.sh", "runner_files": ["events"]}
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        (tmp_path / "board.toml").write_text("\n".join(lines), encoding="utf-8")
        return open_device(str(tmp_path / "board.toml"))

    return make


@pytest.mark.emulated
def test_a_board_computes_what_the_emulated_device_computes(make: Make, board: Board, tiny_bundle: Path) -> None:
    request = ScoreRequest((5, 17, 3))
    device = make(emulated=True)
    assert device.status().usable
    found = device.run(tiny_bundle, request)
    wanted = open_device("arm64").run(tiny_bundle, request)
    assert found.logits is not None
    assert wanted.logits is not None
    np.testing.assert_array_equal(found.logits, wanted.logits)
    assert found.execution == "emulated"
    assert device.fingerprint()["features"] == sorted(wanted_features())
    base = board.home / ".cache" / "boa-edge" / "device"
    assert list((base / "runs").iterdir()) == []
    assert all(len(path.name) == 64 for path in (base / "files").iterdir())


def wanted_features() -> list[str]:
    return list(open_device("arm64").fingerprint()["features"])


def test_a_session_that_breaks_in_mid_run_is_a_second_run(make: Make, board: Board, tiny_bundle: Path) -> None:
    slowly = 'while read -r line; do printf "%s\\n" "$line"; sleep 0.05; done < "$here/events"'
    cuts: list[str] = []

    def cut(event: Event) -> None:
        if event["event"] == "load" and not cuts:
            cuts.append("once")
            board.cut()

    assert list(make(slowly).run(tiny_bundle, GENERATE, cut).events) == EVENTS
    assert cuts
    assert board.phone.running() == []


def test_a_crash_is_told_from_a_lost_connection(make: Make, tiny_bundle: Path) -> None:
    with pytest.raises(BoaEdgeError, match="after 4 events, it was ended by SIGSEGV"):
        make('head -n 4 "$here/events"\nkill -SEGV $$').run(tiny_bundle, GENERATE)
    with pytest.raises(BoaEdgeError, match="after its end event, it exited with 255"):
        make('cat "$here/events"\nexit 255').run(tiny_bundle, GENERATE)


def test_a_host_that_goes_away(make: Make, board: Board, tiny_bundle: Path) -> None:
    device = make('cat "$here/events"')
    device.run(tiny_bundle, GENERATE)
    (board.phone.root / "broken").touch()
    with pytest.raises(BoaEdgeError, match="has not come back within 5 s"):
        device.run(tiny_bundle, GENERATE)


def test_what_the_user_has_to_settle_is_said(make: Make, board: Board, tmp_path: Path) -> None:
    (tmp_path / "client" / "known_hosts").write_text("", encoding="utf-8")
    with pytest.raises(BoaEdgeError, match=r"Host key verification failed\. Check the host's key"):
        make().fingerprint()
    (tmp_path / "client" / "config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n")
    (tmp_path / "keys" / "authorized").write_text("", encoding="utf-8")
    with pytest.raises(BoaEdgeError, match=r"Permission denied.*ssh-copy-id 127\.0\.0\.1"):
        make().fingerprint()
    board.stop()
    with pytest.raises(BoaEdgeError, match="does not answer"):
        make().fingerprint()


@pytest.mark.skipif(tools.find(tools.SSH) is None, reason="no OpenSSH client here")
def test_a_start_file_that_prints_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be in every file that is fetched."""
    shell = SshShell(load_profile("ssh:pi@board"), "pi@board")
    said = "boa-edge\n"
    monkeypatch.setattr("devices.ssh.run_client", lambda *_, **__: subprocess.CompletedProcess([], 0, said, ""))
    shell.greet()
    said = "Welcome to my Pi\nboa-edge\n"
    with pytest.raises(BoaEdgeError, match=r"its shell prints 'Welcome to my Pi' before every.*start files"):
        shell.greet()


@pytest.mark.skipif(tools.find(tools.SSH) is None, reason="no OpenSSH client here")
def test_names_of_one_host_are_one_address() -> None:
    def address(host: str, **fields: Any) -> str:
        return SshShell(Profile(name="board", description="x", transport="ssh", host=host, **fields), host).address()

    assert address("pi@board.example") == address("pi@BOARD.example", port=22) == "pi@board.example:22"
    assert address("pi@board.example", port=2222) == "pi@board.example:2222"


@pytest.mark.skipif(tools.find(tools.SSH) is None, reason="no OpenSSH client here")
@pytest.mark.parametrize("place", ["long", "spaced", "short"])
def test_its_socket_stands_where_a_socket_can(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"long": "x" * 100, "spaced": "a %h b", "short": "run"}[place]
    directory = Path(tempfile.mkdtemp(prefix="boa", dir="/tmp")) / name
    directory.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    host = "nobody@127.0.0.1"
    shell = SshShell(Profile(name="board", description="x", transport="ssh", host=host, port=9), host)
    control = Path(shell._control.name)
    assert control.parent == (directory if place == "short" else Path("/tmp"))
    assert control.stat().st_mode & 0o777 == 0o700
    with pytest.raises(BoaEdgeError, match=r"does not answer \(.*refused"):
        shell.greet()
    del shell
    gc.collect()
    assert not control.exists()
    shutil.rmtree(directory.parent)


def test_a_profile_without_a_host_says_how_to_name_one() -> None:
    status = open_device("ssh").status()
    assert not status.usable
    assert "--device ssh:USER@HOST" in " ".join(status.missing)
    with pytest.raises(UsageError, match="host"):
        open_device("ssh:-oProxyCommand=x")
