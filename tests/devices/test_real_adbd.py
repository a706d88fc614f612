"""The harness against Android's own daemon, where one is at hand: Debian's package `adbd` (bookworm-backports, trixie).

It asks nobody for permission and listens on every interface, so it runs in a network namespace, which takes root; its
virtual-machine socket is not covered by that. `$BOA_EDGE_ADBD` names the program where it is not installed. What runs
on the device is a script: this adbd is for the machine that it runs on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_device_events import GENERATE, script

from devices import tools

_INSTALLED = "/usr/lib/android-sdk/platform-tools/adbd"

# Runs in the namespace. Prints one line of JSON for each run: the events' names, and how often the run was begun.
INSIDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/devices"]
from test_device_events import GENERATE
from adb_server import adb
from devices import open_device

adbd, profile, bundle = sys.argv[2:]
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

def start():
    quiet = subprocess.DEVNULL
    return subprocess.Popen([adbd], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)

daemon = start()
for _ in range(100):
    adb("connect", "127.0.0.1:5555", check=False)
    if adb("-s", "127.0.0.1:5555", "get-state", check=False).strip() == "device":
        break
    time.sleep(0.1)

def kill_once(event):
    global daemon
    if event["event"] == "load" and not killed:
        killed.append(1)
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()
        daemon = start()

for fault in (False, True):
    killed, seen = [] if fault else [1], []
    def listen(event):
        seen.append(event["event"])
        kill_once(event)
    result = open_device(profile).run(Path(bundle), GENERATE, listen)
    print(json.dumps({"events": result.events, "starts": seen.count("start")}), flush=True)
adb("kill-server")
os.killpg(daemon.pid, signal.SIGKILL)
"""


def test_runs_through_androids_own_daemon_and_survives_its_death(tiny_bundle: Path, tmp_path: Path) -> None:
    found = os.environ.get("BOA_EDGE_ADBD") or shutil.which("adbd") or _INSTALLED
    if not Path(found).is_file():
        pytest.skip("no adbd here (Debian package adbd, or $BOA_EDGE_ADBD)")
    if tools.find(tools.ADB) is None or shutil.which("ip") is None:
        pytest.skip("adb or ip is missing")
    namespace = ["unshare", "-n", "-m", "-p", "-f", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0 or subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace without root")
    slowly = 'while read -r line; do printf "%s\\n" "$line"; sleep 0.05; done < "$(dirname "$0")/events"'
    (tmp_path / "runner.sh").write_text(f"#!/bin/sh\n{slowly}\n", encoding="utf-8")
    events = script(GENERATE)
    (tmp_path / "events").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
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
    command = [*namespace, sys.executable, "-c", INSIDE, root, found, str(profile), str(tiny_bundle)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [run["events"] for run in runs] == [events, events]
    assert [run["starts"] for run in runs] == [1, 2]
    assert list((tmp_path / "device" / "boa-edge" / "runs").iterdir()) == []
