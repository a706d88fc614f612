"""All figures of a measurement come about in one way, and a setting no runner takes is refused before a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from report_fakes import FakeDevice, make_bundle, make_device, provenance

from boa_edge.errors import BoaEdgeError, UsageError
from devices import RunResult
from runtime_tests import measure


@dataclass
class Changing(FakeDevice):
    """Another device answers from the second run on, and its property says so."""

    def run(self, *arguments: Any, **options: Any) -> RunResult:
        if self.requests:
            self.execution = "emulated"
        return super().run(*arguments, **options)


def test_a_device_that_becomes_another_one_makes_no_report(tmp_path: Path) -> None:
    device = Changing(**vars(make_device(execution="measured")))
    bundle = make_bundle(tmp_path / "bundle", origin=provenance())
    with pytest.raises(BoaEdgeError, match="a run was emulated where the measurement began as measured"):
        measure(bundle, device, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"cores": (0, -1)}, "--cores: -1 is too small: at least 0"),
        ({"cores": (1024,)}, "--cores: 1024 is too large: at most 1023"),
        ({"threads": 0}, "--threads: 0 is too small: at least 1"),
        ({"threads": (1, 10**20)}, f"--threads: {10**20} is too large: at most 1024"),
        ({"repeats": 10**20}, f"--repeats: {10**20} is too large: at most {1 << 24}"),
    ],
)
def test_a_setting_that_no_runner_takes_is_one_line(tmp_path: Path, settings: dict[str, Any], found: str) -> None:
    device = make_device()
    with pytest.raises(UsageError) as error:
        measure(make_bundle(tmp_path / "bundle", origin=provenance()), device, tmp_path / "report", **settings)
    assert str(error.value) == f"{found}."
    assert device.requests == []
