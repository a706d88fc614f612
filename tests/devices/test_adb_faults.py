"""Whatever happens between here and an Android device, the figures are right after a retry or there are none.

The real adb client and server; the device is tests/devices/adbd.py. Where the runner does not matter it is a script.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from adb_server import adb, attached_phone, private_server
from adbd import Adbd
from test_device_events import GENERATE, script

from boa_edge.errors import BoaEdgeError, UsageError
from devices import GenerateRequest, RunResult, open_device, tools
from devices.adb import AdbTransport
from devices.contract import Event
from devices.device import RunnerDevice
from devices.profile import read_profile
from devices.transport import ConnectionLostError
from runtime_tests.energy import obstacle
from runtime_tests.events import gather_generation
from runtime_tests.throttling import throttling_notes

EVENTS = script(GENERATE)
RIGHT = 'cat "$here/events"'
# Slow enough for something to happen between two lines.
SLOWLY = 'while read -r line; do printf "%s\\n" "$line"; sleep 0.05; done < "$here/events"'
Make = Callable[..., RunnerDevice]


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if tools.find(tools.ADB) is None:
        pytest.skip("no adb client here; `make setup` fetches it")
    with private_server(tmp_path_factory.mktemp("adb")):
        yield


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Adbd]:
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


def test_files_are_pushed_once_and_the_device_is_left_as_it_was(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    device = make()
    before = sorted(path.name for path in daemon.phone.data.iterdir())
    assert_right(device.run(tiny_bundle, GENERATE))
    assert_clean(daemon)
    first = pushed(daemon)
    assert first == 4  # runner, its file, the model, the tokens
    assert_right(make().run(tiny_bundle, GENERATE))
    assert pushed(daemon) == first
    transport = device.transport
    assert isinstance(transport, AdbTransport)
    transport.clean()
    assert sorted(path.name for path in daemon.phone.data.iterdir()) == before


@pytest.mark.parametrize("cuts", [1, 2])
def test_a_cable_pulled_in_mid_push(make: Make, daemon: Adbd, tiny_bundle: Path, cuts: int) -> None:
    daemon.phone.faults.cut_push = [60] * cuts
    assert_right(make().run(tiny_bundle, GENERATE))
    assert daemon.phone.faults.cut_push == []
    assert_clean(daemon)


def test_a_cable_pulled_in_mid_run_is_a_second_run(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    daemon.phone.faults.cut_output = [b'"event": "prefill"']
    seen: list[Event] = []
    assert_right(make(SLOWLY).run(tiny_bundle, GENERATE, seen.append))
    assert [event["event"] for event in seen].count("start") == 2
    assert_clean(daemon)


def test_a_connection_that_always_breaks_gives_no_result(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    daemon.phone.faults.cut_output = [b'"event": "end"'] * 3
    with pytest.raises(ConnectionLostError, match="connection was lost"):
        make(f"{RIGHT}\nsleep 600").run(tiny_bundle, GENERATE)
    assert daemon.phone.faults.cut_output == []
    # What nobody could end then is ended by the next run.
    assert_right(make().run(tiny_bundle, GENERATE))
    assert_clean(daemon)


def test_a_daemon_that_is_restarted(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    timers: list[threading.Timer] = []

    def restart(event: Event) -> None:
        if event["event"] == "load" and not timers:
            daemon.stop()
            timers.append(threading.Timer(1.5, daemon.start))
            timers[0].start()

    assert_right(make(SLOWLY).run(tiny_bundle, GENERATE, restart))
    assert timers
    assert_clean(daemon)


def test_a_reboot_that_empties_the_disk(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    boots: list[str] = []

    def reboot(event: Event) -> None:
        if event["event"] == "load" and not boots:
            boots.append("once")
            daemon.reboot(wipe=True)

    assert_right(make(SLOWLY).run(tiny_bundle, GENERATE, reboot))
    assert pushed(daemon) == 8
    assert_clean(daemon)


def test_a_device_that_stays_away(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    device = make(SLOWLY, reconnect_limit_s=2)
    with pytest.raises(BoaEdgeError, match="has not come back within 2 s"):
        device.run(tiny_bundle, GENERATE, lambda event: daemon.stop())
    daemon.start()


def test_a_full_disk(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    model = (tiny_bundle / "model.onnx").stat().st_size
    daemon.phone.faults.quota = model
    with pytest.raises(BoaEdgeError, match=r"disk is full: .* MiB are to be pushed, .* free.*Free some space"):
        make().run(tiny_bundle, GENERATE)
    assert_clean(daemon)


def test_old_files_make_room_for_new_ones(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    model = (tiny_bundle / "model.onnx").stat().st_size
    daemon.phone.store.mkdir(parents=True)
    for age, name in enumerate("ab"):
        (daemon.phone.store / (name * 64)).write_bytes(bytes(2 * model))
        os.utime(daemon.phone.store / (name * 64), (1e9 - age, 1e9 - age))
    daemon.phone.faults.quota = 4 * model
    assert_right(make().run(tiny_bundle, GENERATE))
    assert_clean(daemon)


def test_a_store_within_its_limit_keeps_what_was_used_last(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    daemon.phone.store.mkdir(parents=True)
    for age, name in enumerate("abc"):
        (daemon.phone.store / (name * 64)).write_bytes(bytes(400_000))
        os.utime(daemon.phone.store / (name * 64), (1e9 - age, 1e9 - age))
    assert_right(make(store_limit_mb=1).run(tiny_bundle, GENERATE))
    left = {path.name[0] * 64 for path in daemon.phone.store.iterdir() if len(set(path.name)) == 1}
    assert left == {"a" * 64, "b" * 64}


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_damaged_on_its_way_is_pushed_again(make: Make, daemon: Adbd, tiny_bundle: Path, times: int) -> None:
    daemon.phone.faults.damage_push = times
    assert_right(make().run(tiny_bundle, GENERATE))
    assert pushed(daemon) == 4 + times


def test_a_line_that_always_damages_is_an_error(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    daemon.phone.faults.damage_push = 100
    with pytest.raises(BoaEdgeError, match="arrived damaged 3 times"):
        make().run(tiny_bundle, GENERATE)
    assert_clean(daemon)


@pytest.mark.parametrize("damage", ["a byte", "cut short", "gone"])
def test_a_store_that_was_damaged_repairs_itself(make: Make, daemon: Adbd, tiny_bundle: Path, damage: str) -> None:
    device = make()
    device.run(tiny_bundle, GENERATE)
    for path in daemon.phone.store.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink() if damage == "gone" else path.write_bytes(content if damage == "a byte" else content[:-1])
    assert_right(device.run(tiny_bundle, GENERATE))
    assert pushed(daemon) == 8


@pytest.mark.parametrize("signal", ["SEGV", "ILL"])
def test_a_runner_that_crashes(make: Make, daemon: Adbd, tiny_bundle: Path, signal: str) -> None:
    with pytest.raises(BoaEdgeError, match=f"after 4 events, it was ended by SIG{signal}"):
        make(f'head -n 4 "$here/events"\nkill -{signal} $$').run(tiny_bundle, GENERATE)
    assert_clean(daemon)


def test_a_runner_that_hangs_is_ended_on_the_device(
    make: Make, daemon: Adbd, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOA_EDGE_SILENCE_LIMIT", "1")
    with pytest.raises(BoaEdgeError, match="printed nothing for 1 s"):
        make('head -n 4 "$here/events"\nexec sleep 600').run(tiny_bundle, GENERATE)
    assert_clean(daemon)


def test_the_devices_own_limit_ends_a_run(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    with pytest.raises(BoaEdgeError, match=r"longer than 1 s on the device. Raise time_limit_s"):
        make('head -n 4 "$here/events"\nexec sleep 600', time_limit_s=1).run(tiny_bundle, GENERATE)
    assert_clean(daemon)


def test_an_interrupt_ends_the_program_on_the_device(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    def interrupt(event: Event) -> None:
        assert daemon.phone.running()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(f"{RIGHT}\nexec sleep 600").run(tiny_bundle, GENERATE, interrupt)
    assert_clean(daemon)


MARK = "boa-edge-end 00000000000000000000000000000000 0"


@pytest.mark.parametrize(
    ("runner", "found"),
    [
        ("echo Loading...", "printed 'Loading...'"),
        ("head -c 200000 /dev/urandom", "not a JSON object|a line of more than"),
        (f"echo; echo {MARK}", "printed ''"),
        (f'{RIGHT}; echo "{MARK}"', "after its end event"),
        ("exit 0", "its output ended after 0 events"),
        ('head -n 5 "$here/events"', "its output ended after 5 events"),
        (f"{RIGHT}; exit 3", "after its end event, it exited with 3"),
        ('grep -v \'"i": 1\' "$here/events"', "broke its contract"),
        ('tail -n 1 "$here/events"', "broke its contract"),
        ('sed s/\'"ns": 9\'/\'"ns": 90000000000\'/ "$here/events"', "s passed here meanwhile"),
    ],
)
def test_a_runner_that_prints_garbage_or_lies(
    make: Make, daemon: Adbd, tiny_bundle: Path, runner: str, found: str
) -> None:
    with pytest.raises(BoaEdgeError, match=found):
        make(runner).run(tiny_bundle, GENERATE)
    assert_clean(daemon)


def test_two_runs_on_one_device_take_turns(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    device = make(SLOWLY)
    results: list[RunResult] = []
    threads = [threading.Thread(target=lambda: results.append(device.run(tiny_bundle, GENERATE))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results:
        assert_right(result)
    steps = [command for command in daemon.phone.commands if "mkdir" in command and "/lock" in command]
    steps += [command for command in daemon.phone.commands if "rm -rf" in command and "/lock" in command]
    order = [command for command in daemon.phone.commands if command in steps]
    assert ["mkdir" in command for command in order] == [True, False, True, False]
    assert_clean(daemon)


def test_somebody_elses_lock_is_respected_and_can_be_broken(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    boot = (daemon.phone.root / "proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    daemon.phone.write("data/local/tmp/boa-edge/lock/owner", f"elsewhere:7 123 {boot}")
    device = make()
    with pytest.raises(BoaEdgeError, match=r"in use by process 123 of elsewhere for \d+ s.*devices clean"):
        device.run(tiny_bundle, GENERATE)
    transport = device.transport
    assert isinstance(transport, AdbTransport)
    transport.clean(force=True)
    assert_right(device.run(tiny_bundle, GENERATE))


@pytest.mark.parametrize("how", ["reboot", "long ago"])
def test_a_lock_that_outlived_its_holder_is_taken_over(make: Make, daemon: Adbd, tiny_bundle: Path, how: str) -> None:
    boot = (daemon.phone.root / "proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    daemon.phone.write("data/local/tmp/boa-edge/lock/owner", f"elsewhere:7 123 {boot}")
    if how == "reboot":
        daemon.phone.boot()
    else:
        os.utime(daemon.phone.data / "boa-edge" / "lock", (1e9, 1e9))
    assert_right(make().run(tiny_bundle, GENERATE))


@pytest.mark.parametrize("seconds", [-(10**9), 10**9])
def test_a_wall_clock_that_is_wrong_changes_nothing_and_is_reported(
    make: Make, daemon: Adbd, tiny_bundle: Path, seconds: int
) -> None:
    daemon.phone.program("date", f"echo $(( $(/bin/date +%s) + {seconds} ))")
    device = make()
    assert_right(device.run(tiny_bundle, GENERATE))
    assert abs(device.fingerprint()["clock_skew_s"] - seconds) <= 60


def test_a_device_without_sha256sum_is_checked_by_fetching(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    for name in ("sha256sum", "toybox", "busybox"):
        daemon.phone.program(name, "exit 127")
    daemon.phone.faults.damage_push = 1
    result = make().run(tiny_bundle, GENERATE)
    assert_right(result)
    assert pushed(daemon) == 5
    assert any("no sha256sum" in note for note in result.notes)


def test_androids_own_shell_and_commands_are_enough(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    shell, commands = tools.find(tools.MKSH), tools.find(tools.TOYBOX)
    if shell is None or commands is None:
        pytest.skip("no toybox and mksh here; `make test` fetches them")
    daemon.phone.userland(shell, commands)
    device = make(SLOWLY)
    daemon.phone.faults.cut_output = [b'"event": "prefill"']
    daemon.phone.faults.damage_push = 1
    result = device.run(tiny_bundle, GENERATE)
    assert_right(result)
    assert_clean(daemon)
    assert result.notes == ()
    assert result.state["before"]["temperatures_c"] == {"zone0:cpu": 41.5}
    assert device.fingerprint()["governors"]["cpu3"] == "schedutil"
    with pytest.raises(BoaEdgeError, match="longer than 1 s on the device"):
        make('head -n 4 "$here/events"\nsleep 600', time_limit_s=1).run(tiny_bundle, GENERATE)
    assert_clean(daemon)


def test_a_device_where_files_cannot_be_linked_gets_copies(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    daemon.phone.program("ln", "exit 1")
    assert_right(make().run(tiny_bundle, GENERATE))
    assert_clean(daemon)


def test_several_devices_are_told_apart(daemon: Adbd, tmp_path: Path) -> None:
    with attached_phone(tmp_path / "other") as other:
        other.phone.properties["ro.product.model"] = "Other Phone"
        other.phone.boot()
        with pytest.raises(BoaEdgeError, match="2 devices are attached") as error:
            open_device("android").fingerprint()
        for serial in (daemon.serial, other.serial):
            assert f"{serial} Directory_Phone" in str(error.value)
        assert open_device(f"android:{other.serial}").fingerprint()["model"] == "Other Phone"
        assert open_device(f"android:{daemon.serial}").fingerprint()["model"] == "Directory Phone"
        status = open_device("android").status()
        assert not status.usable
        assert "--device android:" in " ".join(status.missing)


def test_a_network_device_is_connected_when_it_is_asked_for(daemon: Adbd) -> None:
    adb("disconnect", daemon.serial)
    assert open_device(f"android:{daemon.serial}").fingerprint()["machine"] == "aarch64"


@pytest.mark.parametrize(
    ("fault", "value", "found"),
    [
        ("authorized", False, "accept `Allow USB debugging`"),
        ("silent", True, "does not answer"),
        ("features", "cmd", "Android 7 or later"),
    ],
)
def test_a_device_that_cannot_be_used_says_what_to_do(
    daemon: Adbd, tiny_bundle: Path, fault: str, value: Any, found: str
) -> None:
    setattr(daemon.phone.faults, fault, value)
    adb("disconnect", daemon.serial)
    with pytest.raises(BoaEdgeError, match=found):
        open_device(f"android:{daemon.serial}").run(tiny_bundle, GenerateRequest((1,), 1))


def test_nothing_attached_says_how_to_attach(daemon: Adbd, tiny_bundle: Path) -> None:
    adb("disconnect", daemon.serial)
    with pytest.raises(BoaEdgeError, match=r"no device is attached. Plug the phone in"):
        open_device("android").run(tiny_bundle, GENERATE)
    with pytest.raises(BoaEdgeError, match=r"no device ABC is attached \(attached: none\)"):
        open_device("android:ABC").run(tiny_bundle, GENERATE)


def test_another_processor_is_refused(daemon: Adbd, tiny_bundle: Path) -> None:
    daemon.phone.program("uname", "echo x86_64")
    with pytest.raises(BoaEdgeError, match="its processor is x86_64"):
        open_device(f"android:{daemon.serial}").run(tiny_bundle, GENERATE)


@contextmanager
def no_server(free_port: int) -> Iterator[None]:
    """The user's own server would be at a port where nobody listens; only for the block, or its clean-up starts one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port))
        yield


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_an_adb_server_elsewhere(make: Make, free_port: int, tiny_bundle: Path) -> None:
    port = os.environ["ANDROID_ADB_SERVER_PORT"]
    with no_server(free_port):
        assert_right(make(server=f"127.0.0.1:{port}").run(tiny_bundle, GENERATE))
        with pytest.raises(BoaEdgeError, match=rf"adb server at 127\.0\.0\.1:{free_port} cannot be reached"):
            make(server=f"127.0.0.1:{free_port}").run(tiny_bundle, GENERATE)


def test_listing_devices_starts_no_server(free_port: int) -> None:
    with no_server(free_port):
        assert "no adb server is running" in " ".join(open_device("android").status().missing)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", free_port)) != 0


def test_a_phone_is_never_called_emulated_nor_an_emulator_a_phone(daemon: Adbd, tmp_path: Path) -> None:
    assert open_device("android").execution == "emulated"
    daemon.phone.properties["ro.boot.qemu"] = ""
    daemon.phone.boot()
    assert open_device("android").execution == "measured"
    path = tmp_path / "own.toml"
    path.write_text('description = "x"\ntransport = "adb"\nemulated = true\n', encoding="utf-8")
    assert open_device(str(path)).execution == "emulated"


def test_a_runner_that_cannot_be_used_is_a_usage_error(make: Make, tmp_path: Path, tiny_bundle: Path) -> None:
    device = make()
    (tmp_path / "runner.sh").write_bytes(Path("/bin/sh").read_bytes())
    with pytest.raises(UsageError, match="not a program for 64-bit ARM"):
        device.run(tiny_bundle, GENERATE)
    (tmp_path / "runner.sh").unlink()
    with pytest.raises(UsageError, match="is not a file"):
        device.run(tiny_bundle, GENERATE)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ('serial = "-s x"', "serial"),
        ('server = "nowhere"', "server"),
        ('directory = "relative"', "must be absolute"),
        ('directory = "/data/../etc"', "'..'"),
        ('host = "pi"', "'host' has no meaning"),
        ('runner_files = ["a"]', "runner_path"),
        ("serail = 1", "did you mean 'serial'"),
    ],
)
def test_a_wrong_adb_profile_is_one_line(tmp_path: Path, lines: str, found: str) -> None:
    path = tmp_path / "phone.toml"
    path.write_text(f'description = "x"\ntransport = "adb"\n{lines}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=found):
        read_profile(path)


def test_what_the_device_says_of_itself_is_a_value_or_why_there_is_none(make: Make, daemon: Adbd) -> None:
    daemon.phone.program(
        "getprop", 'case "$1" in ro.soc.model) echo "Permission denied" >&2; exit 1;; *) echo 5;; esac'
    )
    (daemon.phone.root / "proc/meminfo").unlink()
    found = make().fingerprint()
    assert found["soc"] == "denied"
    assert found["memory_bytes"] == "unavailable"
    assert found["board"] == "unavailable"
    assert found["governors"] == {f"cpu{core}": "schedutil" for core in range(4)}
    assert "asimddp" in found["features"]


def test_temperatures_and_clocks_are_read_before_and_after(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    def heat(event: Event) -> None:
        daemon.phone.write("sys/class/thermal/thermal_zone0/temp", "78000\n")
        daemon.phone.dumpsys(thermal=3)

    state = make().run(tiny_bundle, GENERATE, heat).state
    assert state["before"]["temperatures_c"] == {"zone0:cpu": 41.5}
    assert state["after"]["temperatures_c"] == {"zone0:cpu": 78.0}
    assert (state["before"]["thermal_status"], state["after"]["thermal_status"]) == (0, 3)
    assert state["before"]["battery"] == {"level_percent": 81, "temperature_c": 26.4, "powered_by": ["USB"]}


def battery(daemon: Adbd, status: str, current: str) -> None:
    for name, content in {
        "type": "Battery",
        "status": status,
        "current_now": current,
        "voltage_now": "3800000",
    }.items():
        daemon.phone.write(f"sys/class/power_supply/bms/{name}", f"{content}\n")


def test_a_batterys_gauge_is_read_beside_a_run_that_asks_for_it(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    daemon.phone.write("sys/class/power_supply/usb/type", "USB\n")
    device = make(f"sleep 3.2; {RIGHT}")
    assert device.run(tiny_bundle, GENERATE).state["before"]["gauge"] == "unavailable"
    battery(daemon, "Discharging", "-512000")
    result = device.run(tiny_bundle, GENERATE)
    wanted = {"battery": "bms", "status": "Discharging", "current_ua": -512000, "voltage_uv": 3800000}
    assert result.state["after"]["gauge"] == wanted
    assert result.gauge == ()
    result = device.run(tiny_bundle, replace(GENERATE, battery="bms"))
    assert_right(result)
    assert len(result.gauge) >= 2
    assert {(sample.amperes, sample.volts) for sample in result.gauge} == {(-0.512, 3.8)}
    assert all(one.seconds < two.seconds for one, two in pairwise(result.gauge))
    assert obstacle(result.state["after"], "measured") is None
    assert_clean(daemon)
    battery(daemon, "Charging", "300000")
    assert "unplug it" in str(obstacle(device.run(tiny_bundle, GENERATE).state["after"], "measured"))
    with pytest.raises(ValueError, match="no battery's name"):
        device.run(tiny_bundle, replace(GENERATE, battery="$(reboot)"))


def test_a_gauge_that_is_denied_is_not_zero(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    battery(daemon, "Discharging", "x")
    daemon.phone.program(
        "cat", 'case "$1" in */current_now) echo "cat: $1: Permission denied" >&2; exit 1;; esac; exec /bin/cat "$@"'
    )
    result = make("sleep 1.5; " + RIGHT).run(tiny_bundle, replace(GENERATE, battery="bms"))
    assert result.state["before"]["gauge"] == "denied"
    assert result.gauge == ()
    assert "denies" in str(obstacle(result.state["after"], "measured"))


def test_a_phone_that_throttles_is_found_out_twice(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    request = GenerateRequest((1, 2, 3), 40)

    def notes(slow: int, status: int) -> list[str]:
        events = script(request)
        for event in events:
            if event["event"] == "token" and event["i"] >= 27:
                event["ns"] = slow
            elif "ns" in event:
                event["ns"] = 20_000
        daemon.phone.dumpsys(thermal=status)
        result = make(events=events).run(tiny_bundle, request)
        assert result.execution == "measured"
        runs = gather_generation(result, prompt_tokens=3, new_tokens=40, warmup=0, repeats=1)
        return throttling_notes([result], runs, result.execution)

    daemon.phone.properties["ro.boot.qemu"] = ""
    daemon.phone.boot()
    assert notes(20_000, 0) == []
    (slow,) = notes(36_000, 0)
    assert "took 1.80 times as long" in slow
    (hot,) = notes(20_000, 3)
    assert "status 3 (severe)" in hot
