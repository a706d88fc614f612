"""The harness against Android's own daemon, where `make test` could fetch it: Debian's package `adbd` (12: backports).

It asks nobody for permission and listens on every interface, so it runs in a network namespace, which takes root; its
virtual-machine socket is not covered by that. `$BOA_EDGE_ADBD` names another one. What runs on the device is a script:
this adbd is for the machine that it runs on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from phone_runs import EVENTS

from devices import tools

# Runs in the namespace: adbd there, attached to an adb server there. Each line of JSON that it prints is one run.
INSIDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/devices"]
from test_device_events import GENERATE
from adb_server import adb
from boa_edge.errors import BoaEdgeError
from devices import open_device

adbd, profile, bundle, *runs = sys.argv[2:]
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

def start():
    quiet = subprocess.DEVNULL
    return subprocess.Popen([adbd], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)

def kill():
    os.killpg(daemon.pid, signal.SIGKILL)
    daemon.wait()

daemon = start()
for _ in range(100):
    adb("connect", "127.0.0.1:5555", check=False)
    if adb("-s", "127.0.0.1:5555", "get-state", check=False).strip() == "device":
        break
    time.sleep(0.1)

for fault in runs:
    seen = []
    def listen(event):
        global daemon
        seen.append(event["event"])
        if fault == "kill" and seen == ["start", "load"]:
            kill()
            daemon = start()
    try:
        events, error = open_device(profile).run(Path(bundle), GENERATE, listen).events, None
    except BoaEdgeError as failure:
        events, error = None, str(failure)
    print(json.dumps({"events": events, "starts": seen.count("start"), "error": error}), flush=True)
adb("kill-server")
kill()
"""


@dataclass(frozen=True)
class Place:
    """A directory that Android's own daemon hands files to.

    Attributes:
        runs: each of the given names is one run; `kill` kills the daemon in the middle of it.
    """

    directory: Path
    runs: Callable[..., list[dict[str, Any]]]


@pytest.fixture
def place(tmp_path: Path, tiny_bundle: Path) -> Place:
    chosen = os.environ.get("BOA_EDGE_ADBD")
    adbd = Path(chosen) if chosen else tools.find(tools.ADBD)
    if adbd is None:
        pytest.skip("no adbd here; `make test` fetches it where Debian packages it")
    if tools.find(tools.ADB) is None or shutil.which("ip") is None:
        pytest.skip("adb or ip is missing")
    namespace = ["unshare", "-n", "-m", "-p", "-f", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0 or subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace without root")
    slowly = 'while read -r line; do printf "%s\\n" "$line"; sleep 0.05; done < "$(dirname "$0")/events"'
    (tmp_path / "runner.sh").write_text(f"#!/bin/sh\n{slowly}\n", encoding="utf-8")
    (tmp_path / "events").write_text("".join(json.dumps(event) + "\n" for event in EVENTS), encoding="utf-8")
    (tmp_path / "device").mkdir()
    settings = {"description": "adbd", "transport": "adb", "serial": "127.0.0.1:5555", "emulated": True}
    settings |= {"directory": str(tmp_path / "device" / "boa-edge")}
    settings |= {"runner_path": "runner.sh", "runner_files": ["events"]}
    profile = tmp_path / "adbd.toml"
    profile.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items()), encoding="utf-8")
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {"ADB_LOCAL_TRANSPORT_MAX_PORT": "5554", "TMPDIR": str(tmp_path)}
    root = str(Path(__file__).parents[2])

    def runs(*names: str, before: str = "true") -> list[dict[str, Any]]:
        inside = [sys.executable, "-c", INSIDE, root, str(adbd), str(profile), str(tiny_bundle), *names]
        command = [*namespace, "sh", "-c", f'{before} && exec "$@"', "sh", *inside]
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return Place(tmp_path / "device", runs)


def test_runs_through_androids_own_daemon_and_survives_its_death(place: Place) -> None:
    found = place.runs("undisturbed", "kill")
    assert [run["events"] for run in found] == [EVENTS, EVENTS]
    assert [run["starts"] for run in found] == [1, 2]
    assert list((place.directory / "boa-edge" / "runs").iterdir()) == []


def test_androids_own_daemon_on_a_full_disk(place: Place, tiny_bundle: Path) -> None:
    half = (tiny_bundle / "model.onnx").stat().st_size // 2
    (found,) = place.runs("undisturbed", before=f"mount -t tmpfs -o size={half} none {place.directory}")
    assert found["starts"] == 0
    assert "disk is full" in found["error"]
