"""Attention in every version of its kernel equals a plain one in double precision."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from devices import tools
from devices.binaries import Target
from devices.paths import RUNNER_SOURCES

SOURCE = Path(__file__).with_name("attention_check.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-Wno-psabi", "-static")


@pytest.mark.parametrize("target", ["host", pytest.param("aarch64", marks=pytest.mark.emulated)])
def test_every_version_equals_plain_attention(tmp_path: Path, target: Target) -> None:
    compiler = tools.require(tools.HOST if target == "host" else tools.CROSS)
    program = tmp_path / "check"
    subprocess.run([str(compiler), *FLAGS, f"-I{RUNNER_SOURCES}", str(SOURCE), "-o", str(program)], check=True)
    command = [str(program)] if target == "host" else [str(tools.require(tools.QEMU)), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {int(case) for _, case, _ in rows} == set(range(15))
    assert {version for version, _, _ in rows} >= {"baseline"}
    worst = {(version, case): float(error) for version, case, error in rows}
    # Values lie within 1; scores up to some hundreds, whose own rounding is 1e-5, stand in the last case only.
    assert all(error < (2e-4 if case == "11" else 2e-6) for (_, case), error in worst.items()), worst
