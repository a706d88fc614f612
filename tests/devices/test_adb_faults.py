"""Whatever happens between here and an Android device, the figures are right after a retry or there are none.

The real adb client and server; the device is tests/devices/adbd.py. Where the runner does not matter it is a script.
docs/devices.md lists these faults with their outcomes.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adb_server import attached_phone
from adbd import Adbd
from phone_runs import EVENTS, RIGHT, SLOWLY, Make, assert_clean, assert_right, pushed
from test_device_events import GENERATE, script
from tiny_decoder import VOCABULARY

from boa_edge.errors import BoaEdgeError
from devices import RunResult, ScoreRequest, open_device, tools
from devices.adb import AdbTransport
from devices.contract import Event
from devices.remote.store import Store
from devices.selftest import self_test
from devices.transport import ConnectionLostError


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


def test_a_cable_pulled_while_the_device_is_asked_who_it_is(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    """The report asks when everything has been measured: none of that may be lost for it."""
    device = make()
    assert_right(device.run(tiny_bundle, GENERATE))
    daemon.phone.faults.cut_output = [b"Directory Phone"] * 2
    assert device.fingerprint()["model"] == "Directory Phone"
    assert daemon.phone.faults.cut_output == []


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
    with pytest.raises(BoaEdgeError, match=r"disk is full: .* MiB are to be stored, .* free.*Free some space"):
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


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize("fault", ["cut_pull", "damage_pull"])
def test_results_cut_off_or_damaged_on_their_way_back_are_a_second_run(
    make: Make, daemon: Adbd, tiny_bundle: Path, fault: str, hashes: bool
) -> None:
    request = ScoreRequest((1, 2))
    logits = np.arange(2 * VOCABULARY, dtype="<f4").reshape(2, VOCABULARY)
    octal = "".join(f"\\{byte:03o}" for byte in logits.tobytes())
    device = make(f"{RIGHT}\nprintf '{octal}' > logits.bin", events=script(request))
    if not hashes:
        for name in ("sha256sum", "toybox", "busybox"):
            daemon.phone.program(name, "exit 127")
    seen: list[str] = []

    def listen(event: Event) -> None:
        seen.append(event["event"])
        if seen.count("end") == 1 and seen[-1] == "end":  # what is fetched from here on are results
            setattr(daemon.phone.faults, fault, [60] if fault == "cut_pull" else 1)

    result = device.run(tiny_bundle, request, listen)
    assert seen.count("start") == 2
    assert result.logits is not None
    np.testing.assert_array_equal(result.logits, logits)
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


def test_two_names_for_one_device_take_turns(make: Make, daemon: Adbd, tiny_bundle: Path, tmp_path: Path) -> None:
    device = make(SLOWLY)
    (tmp_path / "other.toml").write_text((tmp_path / "phone.toml").read_text(encoding="utf-8"), encoding="utf-8")
    results: list[RunResult] = []
    threads = [
        threading.Thread(target=lambda one=one: results.append(one.run(tiny_bundle, GENERATE)))
        for one in (device, open_device(str(tmp_path / "other.toml")))
    ]
    threads[0].start()
    while not daemon.phone.running():
        time.sleep(0.02)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results:
        assert_right(result)
    starts = [command for command in daemon.phone.commands if "wait $p" in command]
    assert len(starts) == 2
    assert_clean(daemon)


@pytest.mark.parametrize("holder", ["alive", "dead", "another by that number", "this one, done"])
def test_a_lock_of_this_machine_is_taken_over_only_from_the_dead(
    make: Make, daemon: Adbd, tiny_bundle: Path, holder: str
) -> None:
    """Two ways to one device, such as a cable and the network, do not meet at the lock of this machine."""
    boot = (daemon.phone.root / "proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    with subprocess.Popen(["sleep", "600"]) as process:
        started = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").split()[21]
        if holder == "dead":
            process.kill()
            process.wait()
        pid = os.getpid() if holder == "this one, done" else process.pid
        mark = f"{int(started) - (holder == 'another by that number')}-00"
        line = f"{socket.gethostname()}:{os.geteuid()} {pid} {boot} {mark}\n"
        daemon.phone.write("data/local/tmp/boa-edge/lock/owner", line)
        os.utime(daemon.phone.data / "boa-edge" / "lock", (1e9, 1e9))
        try:
            if holder == "alive":
                with pytest.raises(BoaEdgeError, match=f"in use by process {pid} of "):
                    make().run(tiny_bundle, GENERATE)
            else:
                assert_right(make().run(tiny_bundle, GENERATE))
        finally:
            process.kill()


@pytest.mark.parametrize("field", [{}, {"i": 0}])
def test_a_runner_cannot_have_worked_while_its_files_were_on_their_way(
    make: Make, daemon: Adbd, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, field: dict[str, int]
) -> None:
    ensure = Store.ensure

    def slowly(self: Store, files: Mapping[str, Path]) -> None:
        ensure(self, files)
        time.sleep(3)

    monkeypatch.setattr(Store, "ensure", slowly)
    events = [event | {"ns": 2_900_000_000, **field} if event["event"] == "load" else event for event in EVENTS]
    with pytest.raises(BoaEdgeError, match=r"claims 2\.9 s of work, but only .* s passed here meanwhile"):
        make(events=events).run(tiny_bundle, GENERATE)


def test_a_runner_that_prints_on_and_on_is_stopped(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    started = time.monotonic()
    with pytest.raises(BoaEdgeError, match="printed 'garbage'"):
        make("while :; do echo garbage; sleep 0.2; done").run(tiny_bundle, GENERATE)
    assert time.monotonic() - started < 20
    assert_clean(daemon)


@pytest.mark.parametrize("runner", ["head -c 300000 /dev/zero | tr '\\0' '['; echo; exit 1", "yes"])
def test_the_self_test_stands_what_a_runner_prints(make: Make, daemon: Adbd, runner: str) -> None:
    works = {step.name: step.works for step in self_test(make(runner)).steps}
    assert (works["files"], works["program"], works["model"]) == (True, False, False)
    assert_clean(daemon)


def test_two_devices_at_once_do_not_hear_of_each_other(
    make: Make, daemon: Adbd, tiny_bundle: Path, tmp_path: Path
) -> None:
    with attached_phone(tmp_path / "other") as other:
        phones = (daemon, other)
        starts = dict.fromkeys(phones, 0)
        both_run = threading.Barrier(2, timeout=60)

        def run(phone: Adbd) -> RunResult:
            def listen(event: Event) -> None:
                starts[phone] += event["event"] == "start"
                if event["event"] == "load" and starts[phone] == 1:
                    both_run.wait()

            return devices[phone].run(tiny_bundle, GENERATE, listen)

        devices = {phone: make(SLOWLY, serial=phone.serial) for phone in phones}
        other.phone.faults.cut_output = [b'"event": "prefill"']
        with ThreadPoolExecutor(2) as pool:
            for result in pool.map(run, phones):
                assert_right(result)
        assert list(starts.values()) == [1, 2]
        for phone in phones:
            assert_clean(phone)


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


@pytest.mark.parametrize("owner", [None, "", "\0" * 60, "elsewhere:7 12"])
def test_a_lock_that_nobody_signed_is_taken_over_a_minute_later(
    make: Make, daemon: Adbd, tiny_bundle: Path, owner: str | None
) -> None:
    """Its holder found no room to write who it is, or the power went before the disk had it."""
    lock = daemon.phone.data / "boa-edge" / "lock"
    lock.mkdir(parents=True)
    if owner is not None:
        daemon.phone.write("data/local/tmp/boa-edge/lock/owner", owner)
    with pytest.raises(BoaEdgeError, match=r"in use by process unknown of unknown for \d+ s"):
        make().run(tiny_bundle, GENERATE)
    os.utime(lock, (time.time() - 100,) * 2)
    assert_right(make().run(tiny_bundle, GENERATE))
    assert_clean(daemon)


def test_a_lock_that_another_run_has_taken_since_is_left_to_it(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    place = "data/local/tmp/boa-edge/lock/owner"

    def take(event: Event) -> None:
        if event["event"] == "load":
            daemon.phone.write(place, "elsewhere:7 123 unknown theirs")

    assert_right(make(SLOWLY).run(tiny_bundle, GENERATE, take))
    assert (daemon.phone.root / place).read_text(encoding="utf-8") == "elsewhere:7 123 unknown theirs"


@pytest.mark.parametrize("name", ["thesis.pdf", ".git/config", "runs/exp1/best.pt", "files/thesis.pdf", "runs/.hidden"])
def test_a_directory_with_something_of_the_users_is_not_touched(
    make: Make, daemon: Adbd, tiny_bundle: Path, name: str
) -> None:
    """A profile may name a directory that was there before; what is in ours gets removed."""
    daemon.phone.write(f"data/local/tmp/boa-edge/{name}", "theirs")
    device = make()
    transport = device.transport
    assert isinstance(transport, AdbTransport)
    for work in (lambda: device.run(tiny_bundle, GENERATE), transport.clean, lambda: transport.clean(force=True)):
        with pytest.raises(BoaEdgeError, match=r"boa-edge holds .*, which is not ours.*Name another `directory`"):
            work()
    assert (daemon.phone.data / "boa-edge" / name).read_text(encoding="utf-8") == "theirs"


def test_cores_that_the_device_does_not_grant_are_an_error(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    runner = """sed 's/"threads"/"cores": 1, "threads"/' "$here/events\""""
    (start, *_) = make(runner).run(tiny_bundle, replace(GENERATE, cores=(0,))).events
    assert start["cores"] == 1
    with pytest.raises(BoaEdgeError, match=r"of the cores 0,7 it grants 1\. Choose --cores among those"):
        make(runner).run(tiny_bundle, replace(GENERATE, cores=(0, 7)))


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


def test_where_files_are_copied_old_ones_make_room_too(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    model = (tiny_bundle / "model.onnx").stat().st_size
    daemon.phone.program("ln", "exit 1")
    full = f"[ -e {daemon.phone.store}/{'a' * 64} ]"
    daemon.phone.program("cp", f'{full} || exec /bin/cp "$@"\necho cp: no space left on device >&2\nexit 1')
    daemon.phone.store.mkdir(parents=True)
    (daemon.phone.store / ("a" * 64)).write_bytes(bytes(2 * model))
    assert_right(make().run(tiny_bundle, GENERATE))
    assert_clean(daemon)
