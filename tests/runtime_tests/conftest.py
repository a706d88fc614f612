"""Reports made from a fake bundle on a fake device."""

from __future__ import annotations

import pytest
from report_fakes import HOSTILE, Made, make, make_device, provenance


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """On an emulated device, with everything recorded."""
    return make(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """On real hardware, with everything recorded."""
    return make(tmp_path_factory.mktemp("measured"), execution="measured", name="host")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Every text that comes from outside tries to be markup; the runs are many and their numbers extreme."""
    origin = provenance()
    origin["source"] = {"model": f"evil/{HOSTILE}" + "x" * 120, "files": {HOSTILE: "ab" * 32}}
    origin["calibration"]["source"] = HOSTILE
    origin["versions"] = {HOSTILE: HOSTILE}
    origin["evaluation"]["source"] = HOSTILE
    origin["layers"][0]["name"] = f"model.layers.0.{HOSTILE}$\\frac$"
    for index, kl in enumerate([1e-6, 3.0, 3.001, 3.002, 14.5]):
        origin["comparison"].append(
            {"method": f"{HOSTILE}{index}", "recipe": HOSTILE, "kl": kl, "payload_bytes": 10**8 + index, "top1": 0.5}
        )
    bundle = {"origin": origin, "hostile": HOSTILE}
    greedy = make_device().greedy * 0 + 5
    return make(tmp_path_factory.mktemp("hostile"), bundle=bundle, greedy=greedy, name=HOSTILE)
