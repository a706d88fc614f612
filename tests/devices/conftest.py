"""Fixtures of several files: a tiny bundle, and an emulated phone attached to a private adb server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adb_server import attached_phone, private_server
from adbd import Adbd
from phone_runs import EVENTS, RIGHT, Make
from tiny_decoder import write_bundle

from devices import open_device, tools
from devices.device import RunnerDevice


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose model takes milliseconds."""
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The real adb server, on a port of its own."""
    if tools.find(tools.ADB) is None:
        pytest.skip("no adb client here; `make setup` fetches it")
    with private_server(tmp_path_factory.mktemp("adb")):
        yield


@pytest.fixture
def daemon(tmp_path: Path, server: None) -> Iterator[Adbd]:
    """A phone, attached."""
    with attached_phone(tmp_path / "phone") as daemon:
        yield daemon


@pytest.fixture
def make(tmp_path: Path, daemon: Adbd) -> Make:
    """A device of a profile whose runner is a shell script with the right events beside it."""

    def make(runner: str = RIGHT, events: list[dict[str, Any]] = EVENTS, **fields: Any) -> RunnerDevice:
        (tmp_path / "runner.sh").write_text(f'#!/bin/sh\nhere=$(dirname "$0")\n{runner}\n', encoding="utf-8")
        (tmp_path / "events").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
        settings = {"description": "a phone", "transport": "adb", "serial": daemon.serial} | fields
        settings |= {"runner_path": "runner.sh", "runner_files": ["events"]}
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        (tmp_path / "phone.toml").write_text("\n".join(lines), encoding="utf-8")
        return open_device(str(tmp_path / "phone.toml"))

    return make
