"""Energy comes from a battery that is being used and a gauge that moves, or there is a reason why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.contract import GaugeSample, GenerateRequest
from runtime_tests import measure
from runtime_tests.energy import energy, obstacle, repeats
from runtime_tests.events import Generation, GenerationRun
from tests.runtime_tests.report_fakes import make_bundle, make_device

RUN = GenerationRun(0, False, 4, 500_000_000, (1, 2, 3), (200_000_000, 300_000_000))
GENERATION = Generation(load_ns=None, runs=(RUN,), peak_rss_bytes=None, rss_bytes=None)
STATE = {"gauge": {"battery": "bms", "status": "Discharging", "current_ua": -500_000, "voltage_uv": 4_000_000}}


def samples(count: int = 12, scale: float = 1.0, sign: float = -1.0) -> tuple[GaugeSample, ...]:
    """Power that rises from 2 W on by 0.1 W a second."""
    return tuple(GaugeSample(100.0 + i, sign * scale * (2 + 0.1 * i) / 4, 4.0) for i in range(count))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_power_is_the_mean_over_time_whatever_the_sign(sign: float) -> None:
    found = energy(samples(sign=sign), 0, GENERATION)
    assert found.reason is None
    assert found.power is not None
    assert found.per_token is not None
    assert (found.power.unit, found.power.execution, found.power.n) == ("W", "measured", 12)
    assert found.power.value == pytest.approx(2.55)
    assert found.per_token.value == pytest.approx(2.55 * 0.25)
    # A sample that is missing weighs nothing: the others lie further apart.
    gap = energy((*samples()[:5], *samples()[6:]), 0, GENERATION).power
    assert gap is not None
    assert gap.value == pytest.approx(2.55)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((), "read 0 times while the workload ran; 10 are needed"),
        (samples(9), "read 9 times"),
        (tuple(GaugeSample(float(i), -0.5, 4.0) for i in range(30)), "hardly moved"),
        (samples(6) + samples(6, sign=1.0), "in turns"),
        (samples(scale=1e-3), "may not count in microamperes"),
        (samples(scale=1e3), "may not count in microamperes"),
    ],
)
def test_readings_that_say_nothing_are_no_figure(given: tuple[GaugeSample, ...], reason: str) -> None:
    found = energy(given, 0, GENERATION)
    assert found.power is None
    assert found.per_token is None
    assert found.reason is not None
    assert reason in found.reason


def test_what_loading_draws_is_no_part_of_a_token() -> None:
    loading = tuple(GaugeSample(float(i), 0.25 + 0.001 * (i % 3), 4.0) for i in range(15))
    decoding = tuple(GaugeSample(15.0 + i, 1.25 + 0.001 * (i % 3), 4.0) for i in range(10))
    run = GenerationRun(0, False, 8, 1_000_000_000, (1,) * 11, (1_000_000_000,) * 10)
    generation = Generation(load_ns=None, runs=(run,), peak_rss_bytes=None, rss_bytes=None)
    found = energy(loading + decoding, 15_000_000_000, generation).per_token
    assert found is not None
    assert found.value == pytest.approx(5, rel=2e-3)
    assert "read 9 times" in str(energy(loading + decoding, 16_000_000_000, generation).reason)
    assert "did not say how long" in str(energy(loading + decoding, None, generation).reason)


def test_why_a_device_gives_none() -> None:
    assert obstacle(STATE, "measured") is None
    assert "emulated" in str(obstacle(STATE, "emulated"))
    assert "no battery" in str(obstacle({}, "measured"))
    assert "no battery" in str(obstacle({"gauge": "unavailable"}, "measured"))
    assert "denies" in str(obstacle({"gauge": "denied"}, "measured"))
    assert "unplug" in str(obstacle({"gauge": {**STATE["gauge"], "status": "Full"}}, "measured"))


def test_the_workload_is_repeated_until_the_gauge_has_been_read_often_enough() -> None:
    assert repeats(GENERATION) == 20  # of one second each


def test_the_report_has_it_or_says_why_not(tmp_path: Path) -> None:
    device = make_device(execution="measured", state=STATE, gauge=samples(15))  # it loads for 2.4 s
    report = measure(make_bundle(tmp_path / "bundle"), device, tmp_path / "report", workload="pp4/tg3")
    assert report.energy is not None
    assert report.energy.power is not None
    assert report.energy.power.value == pytest.approx(2.85)
    asked = [request for request in device.requests if isinstance(request, GenerateRequest) and request.battery]
    assert [(request.battery, request.warmup, request.repeats) for request in asked] == [("bms", 0, 4)]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Energy per token" in page
    assert "2.85 W" in page

    report = measure(make_bundle(tmp_path / "other"), make_device(execution="measured"), tmp_path / "without")
    assert report.energy is not None
    assert report.energy.power is None
    page = (tmp_path / "without" / "report.html").read_text()
    assert "not measured: no battery" in page
