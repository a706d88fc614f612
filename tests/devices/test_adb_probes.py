"""What a device says of itself while it is measured: a value or why there is none, never a silent 0."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from adbd import Adbd
from phone_runs import RIGHT, Make, assert_clean, assert_right
from test_device_events import GENERATE, script

from devices import GenerateRequest
from devices.contract import Event
from runtime_tests.energy import obstacle
from runtime_tests.events import gather_generation
from runtime_tests.throttling import throttling_notes


def battery(daemon: Adbd, status: str, current: str) -> None:
    for name, content in {
        "type": "Battery",
        "status": status,
        "current_now": current,
        "voltage_now": "3800000",
    }.items():
        daemon.phone.write(f"sys/class/power_supply/bms/{name}", f"{content}\n")


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


def test_numbers_that_cannot_be_are_unavailable(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    huge = "1" + "0" * 400
    daemon.phone.program("dumpsys", f"echo '  level: 50'; echo '  temperature: {huge}'; echo 'Thermal Status: {huge}'")
    daemon.phone.write("sys/class/thermal/thermal_zone1/type", "gpu\n")
    daemon.phone.write("sys/class/thermal/thermal_zone1/temp", f"{huge}\n")
    daemon.phone.write("proc/meminfo", f"MemTotal: {huge} kB\n")
    battery(daemon, "Discharging", huge)
    device = make("sleep 1.5; " + RIGHT)
    result = device.run(tiny_bundle, replace(GENERATE, battery="bms"))
    state = result.state["before"]
    assert state["battery"] == {"level_percent": 50, "powered_by": "battery"}
    assert state["temperatures_c"] == {"zone0:cpu": 41.5}
    assert (state["thermal_status"], state["gauge"], result.gauge) == ("unavailable", "unavailable", ())
    assert device.fingerprint()["memory_bytes"] == "unavailable"


def test_temperatures_and_clocks_are_read_before_and_after(make: Make, daemon: Adbd, tiny_bundle: Path) -> None:
    def heat(event: Event) -> None:
        daemon.phone.write("sys/class/thermal/thermal_zone0/temp", "78000\n")
        daemon.phone.dumpsys(thermal=3)

    state = make().run(tiny_bundle, GENERATE, heat).state
    assert state["before"]["temperatures_c"] == {"zone0:cpu": 41.5}
    assert state["after"]["temperatures_c"] == {"zone0:cpu": 78.0}
    assert (state["before"]["thermal_status"], state["after"]["thermal_status"]) == (0, 3)
    assert state["before"]["battery"] == {"level_percent": 81, "temperature_c": 26.4, "powered_by": ["USB"]}


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
    request = GenerateRequest((1, 2, 3), 20, repeats=2)

    def notes(slow: int, status: int) -> list[str]:
        events = script(request)
        for event in events:
            if event["event"] == "token" and event["i"] and event["run"] == 1:
                event["ns"] = slow
            elif "ns" in event:
                event["ns"] = 20_000
        daemon.phone.dumpsys(thermal=status)
        result = make(events=events).run(tiny_bundle, request)
        assert result.execution == "measured"
        runs = gather_generation(result, prompt_tokens=3, new_tokens=20, warmup=0, repeats=2)
        return throttling_notes([result], runs, result.execution)

    daemon.phone.properties["ro.boot.qemu"] = ""
    daemon.phone.boot()
    assert notes(20_000, 0) == []
    (slow,) = notes(36_000, 0)
    assert "took 1.80 times as long" in slow
    (hot,) = notes(20_000, 3)
    assert "status 3 (severe)" in hot
