"""What the tests of adb devices share: a scripted runner's events, and what must hold after a run."""

from __future__ import annotations

from collections.abc import Callable

from adbd import Adbd
from test_device_events import GENERATE, script

from devices import RunResult
from devices.device import RunnerDevice

EVENTS = script(GENERATE)
RIGHT = 'cat "$here/events"'
# Slow enough for something to happen between two lines.
SLOWLY = 'while read -r line; do printf "%s\\n" "$line"; sleep 0.05; done < "$here/events"'
Make = Callable[..., RunnerDevice]


def assert_clean(daemon: Adbd) -> None:
    """Only whole files of the store are left, and nothing runs."""
    base = daemon.phone.data / "boa-edge"
    assert list((base / "runs").iterdir()) == []
    assert not (base / "lock").exists()
    assert all(len(path.name) == 64 for path in daemon.phone.store.iterdir())
    assert daemon.phone.running() == []


def assert_right(result: RunResult) -> None:
    assert list(result.events) == EVENTS
    assert result.execution == "emulated"


def pushed(daemon: Adbd) -> int:
    return len(daemon.phone.pushed)
