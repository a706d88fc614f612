"""What `foresee` refuses, `check` refuses in the checkpoint too, and nothing else: no hours of quantizing in vain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from boa_edge.errors import BoaEdgeError, UsageError
from exporters import Activations, Request
from exporters.executorch import EXPORTER
from tests.conftest import make_model, tiny_config
from tests.exporters.test_executorch import CALIBRATION
from toolchain.checkpoint import Checkpoint
from toolchain.families import describe
from toolchain.quantize import quantize
from toolchain.recipe import Recipe, parse_recipe

PER_CHANNEL = {"weights": {"bits": 4, "group_size": None}}
UNTIED = {"tie_word_embeddings": False}
ODD = {"intermediate_size": 97}
Case = tuple[dict[str, Any], dict[str, Any], Activations, str]

REFUSED: dict[str, Case] = {
    "8-bit groups of an untied head": ({"embedding": {"bits": 8, "group_size": 32}}, UNTIED, "int8", "8-bit table"),
    "small groups of an untied head": ({"embedding": {"bits": 4, "group_size": 16}}, UNTIED, "int8", "groups of 16"),
    "groups of the head, float inputs": (
        {**PER_CHANNEL, "embedding": {"bits": 4, "group_size": 32}},
        {},
        "float32",
        r"--activations: .*as the head's are \(recipe: embedding\)",
    ),
    "groups of an untied head, float inputs": (
        {**PER_CHANNEL, "embedding": {"bits": 4, "group_size": 32}},
        UNTIED,
        "float32",
        "--activations",
    ),
    "scales of the head": (
        {**PER_CHANNEL, "embedding": {"bits": 4, "group_size": 32}, "round_scales": False},
        {},
        "int8",
        "round_scales",
    ),
    "odd inputs": (PER_CHANNEL, ODD, "int8", "down_proj has 97 inputs, .* in pairs.*8 bits"),
}
ACCEPTED: dict[str, Case] = {
    "static ranges that nobody uses": ({**PER_CHANNEL, "activations": {"scheme": "static_int8"}}, {}, "float32", ""),
    "odd inputs of 8 bits": ({"weights": {"bits": 8, "group_size": None}}, ODD, "int8", ""),
    "scales of channels": ({**PER_CHANNEL, "round_scales": False}, {}, "float32", ""),
}


def case(values: Case, directory: Path) -> tuple[Path, Recipe, Any, Request]:
    fields, changes, activations, _ = values
    chosen = {"method": "rtn", "weights": {"bits": 4, "group_size": 32}, "calibration": CALIBRATION, **fields}
    model = make_model(directory / "model", tiny_config(num_hidden_layers=1, **changes))
    spec = describe(json.loads((model / "config.json").read_text()), "config.json")
    return model, parse_recipe(chosen, "test"), spec, Request(activations, "llm")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_and_after(name: str, text_file: Path, tmp_path: Path) -> None:
    model, recipe, spec, request = case(REFUSED[name], tmp_path)
    with pytest.raises(UsageError, match=REFUSED[name][-1]):
        EXPORTER.foresee(recipe, spec, request)
    quantize(str(model), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    with pytest.raises(BoaEdgeError):
        EXPORTER.check(Checkpoint(tmp_path / "checkpoint"), request)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_before_and_after(name: str, text_file: Path, tmp_path: Path) -> None:
    model, recipe, spec, request = case(ACCEPTED[name], tmp_path)
    EXPORTER.foresee(recipe, spec, request)
    quantize(str(model), tmp_path / "checkpoint", recipe=recipe, calibration=str(text_file))
    EXPORTER.check(Checkpoint(tmp_path / "checkpoint"), request)
