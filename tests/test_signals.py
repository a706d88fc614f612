"""A command that is asked to end leaves nothing running and says so in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.test_cli import call

ROOT = Path(__file__).parents[1]
# The program of a device in place of the list of devices.
COMMAND = """
import os, signal, sys
# Whoever runs the tests may ignore some of them (`nohup`, `&`), and children inherit that.
for each in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from boa_edge import cli
import devices
from devices.process import run_lines

script = 'trap "" TERM HUP; echo $$ > "$0.part"; mv "$0.part" "$0"; while :; do sleep 0.1; done'
program = ["sh", "-c", script, sys.argv[1]]
devices.list_devices = lambda: run_lines(program, {"PATH": os.defpath}, print, 600)
sys.argv = ["boa-edge", "devices"]
cli.main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
@pytest.mark.parametrize("times", [1, 3])
def test_a_signal_ends_the_program_of_a_run(name: str, code: int, times: int, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    command = [sys.executable, "-c", COMMAND, str(pid)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not pid.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(times if name != "SIGINT" else 1):
        process.send_signal(signal.Signals[name])
    _, said = process.communicate(timeout=60)
    words = "interrupted" if name == "SIGINT" else f"interrupted by {name}"
    assert (process.returncode, said) == (code, f"error: {words}.\n")
    assert not psutil.pid_exists(int(pid.read_text(encoding="utf-8")))


@pytest.mark.parametrize(("command", "kept"), [("quantize", True), ("export", False)])
def test_a_signal_says_what_is_kept_as_ctrl_c_does(
    command: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("toolchain.quantize.quantize", end)
    monkeypatch.setattr("exporters.export", end)
    done = call(command, "default", "-o", tmp_path / "x")
    more = " Finished blocks are kept, and the same command goes on from there." if kept else ""
    assert (done.returncode, done.stderr) == (143, f"error: interrupted by SIGTERM.{more}\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_nohup_keeps_its_meaning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("exporters.export", lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP) or 1 / 0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = call("export", "default", "-o", tmp_path / "x")
        assert (done.returncode, "ZeroDivisionError" in done.stderr) == (1, True)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
