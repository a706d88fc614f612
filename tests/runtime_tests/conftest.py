"""Reports made from a fake bundle on a fake device."""

from __future__ import annotations

import pytest
from report_fakes import HOSTILE, RECIPE_A8, Made, activations, make, make_device, provenance


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """On an emulated device, of a bundle from before activations were planned, with everything else recorded."""
    return make(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """On real hardware, with everything recorded."""
    bundle = {"origin": provenance() | activations(), "recipe": RECIPE_A8}
    return make(tmp_path_factory.mktemp("measured"), bundle=bundle, execution="measured", name="host")


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
    planned = activations()
    planned["transforms"] = {"names": [HOSTILE], "notes": [HOSTILE * 3]}
    planned["activations"] |= {"kept": [HOSTILE], "costs": {HOSTILE: 1e-300, "a" * 200: 1e300}}
    for side, largest in (("before", 1e300), ("after", 5e-324)):
        planned["outliers"][side] = [
            {"layer": layer, "place": "down", "maximum": largest, "typical": 0.0, "kurtosis": largest}
            for layer in (0, 10_000)
        ]
    recipe = RECIPE_A8 | {"activations": {"scheme": HOSTILE}, "transforms": [HOSTILE]}
    bundle = {"origin": origin | planned, "hostile": HOSTILE, "recipe": recipe}
    greedy = make_device().greedy * 0 + 5
    return make(tmp_path_factory.mktemp("hostile"), bundle=bundle, greedy=greedy, name=HOSTILE)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Every name from outside is long and has no place to break it."""
    origin = provenance() | activations()
    origin["source"]["model"] = "model" * 14
    origin["calibration"]["source"] = "c" * 150
    origin["evaluation"]["source"] = "https://example.org/" + "e" * 150
    origin["layers"][0] |= {"name": "model.layers.0." + "y" * 120, "relative_loss": 0.5}
    origin["comparison"][3] |= {"recipe": "w4g32a8-" + "z" * 120}
    origin["comparison"][2] |= {"method": "q" * 70}
    origin["transforms"] = {"names": ["t" * 80], "notes": ["n" * 200]}
    origin["versions"] = {"v" * 60: "w" * 90}
    origin["recipe"] = "w4g32" + "r" * 90
    bundle = {"origin": origin, "recipe": RECIPE_A8}
    state = {"throttled": "0x" + "5" * 200, "temperatures_c": {"zone0:" + "c" * 80: 41.0}}
    name = "ssh:user@" + "averylongboardname" * 4 + ".lab.example"
    made = tmp_path_factory.mktemp("unbroken")
    return make(made, bundle=bundle, execution="measured", name=name, state=state, facts={"board": "b" * 90})
