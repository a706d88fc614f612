"""A hot device is waited for; one that stays hot is refused; one that does not say is taken as it is."""

from __future__ import annotations

from typing import Any

import pytest

from boa_edge.errors import BoaEdgeError, UsageError
from devices.cooling import temperature_of, wait_until_cool
from devices.profile import load_profile


class Phone:
    """Its battery has the next of the temperatures whenever it is asked; time passes only in `sleep`."""

    def __init__(self, *temperatures: float) -> None:
        self.temperatures, self.asked, self.now = list(temperatures), 0, 0.0

    def read(self) -> dict[str, Any]:
        value = self.temperatures[min(self.asked, len(self.temperatures) - 1)]
        self.asked += 1
        return {"battery": {"temperature_c": value}, "temperatures_c": {"thermal_zone0:cpu": 90.0}}

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    def wait(self, below: float | None, limit: float = 60.0) -> dict[str, Any]:
        return wait_until_cool(self.read, below, limit, "phone", clock=lambda: self.now, sleep=self.sleep)


def test_it_waits_no_longer_than_it_must() -> None:
    phone = Phone(41.0, 38.5, 37.0, 30.0)
    assert phone.wait(37.0)["battery"]["temperature_c"] == 37.0
    assert (phone.asked, phone.now) == (3, 20.0)


def test_a_cool_one_is_not_waited_for_nor_any_without_a_limit() -> None:
    for phone, below in ((Phone(36.9), 37.0), (Phone(60.0), None)):
        phone.wait(below)
        assert (phone.asked, phone.now) == (1, 0.0)


def test_one_that_stays_hot_is_refused_after_the_limit() -> None:
    phone = Phone(45.0)
    with pytest.raises(BoaEdgeError, match=r"still at 45\.0 °C after 25 s; runs start at 37 °C"):
        phone.wait(37.0, limit=25.0)


@pytest.mark.parametrize(
    ("state", "temperature"),
    [
        ({}, None),
        ({"battery": "denied", "temperatures_c": "unavailable"}, None),
        ({"battery": {"level_percent": 50}, "temperatures_c": {"a": 41.5, "b": 60.0}}, 60.0),
        ({"battery": {"temperature_c": 30.1}, "temperatures_c": {"a": 41.5}}, 30.1),
    ],
)
def test_the_temperature_is_the_batterys_else_the_hottest_zones(state: dict[str, Any], temperature: float) -> None:
    assert temperature_of(state) == temperature
    assert wait_until_cool(lambda: state, 20.0 if temperature is None else None, 0.0, "phone") == state


def test_phones_are_waited_for_by_default_and_this_machine_has_no_such_field(tmp_path: Any) -> None:
    assert load_profile("android").start_below_c == 37.0
    assert load_profile("host").start_below_c is None
    (tmp_path / "own.toml").write_text('description = "x"\ntransport = "local"\nstart_below_c = 30.0\n')
    with pytest.raises(UsageError, match="start_below_c"):
        load_profile(str(tmp_path / "own.toml"))
