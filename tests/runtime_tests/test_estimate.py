"""Estimates for devices that are not attached: the formula against published figures, and that they stay apart."""

from __future__ import annotations

import pytest
from report_fakes import Made

from runtime_tests.estimate import bytes_per_token, estimates
from runtime_tests.figure import Figure
from runtime_tests.model import Deployed

TIED = {"vocab_size": 128256, "hidden_size": 2048, "tie_word_embeddings": True}


def deployed(made: Made, runtime: str, size: float, recipe: dict[str, object] | None = None) -> Deployed:
    changes = {
        "runtime": runtime,
        "model_size": Figure(value=size, unit="bytes", execution="measured"),
        "recipe": recipe or {"embedding": {"bits": 8, "group_size": None}},
    }
    return made.report.deployed.model_copy(update=changes)


@pytest.mark.parametrize(("gigabytes", "published"), [(2.47, 19.2), (0.87, 50.2), (6.43, 7.6), (2.16, 19.7)])
def test_the_formula_gives_what_others_measured_on_a_phone(measured: Made, gigabytes: float, published: float) -> None:
    """Llama 3.2 1B and 3B, bfloat16 and int4, on a OnePlus 12, as ExecuTorch's README has them."""
    found = estimates(deployed(measured, "onnx", gigabytes * 1e9), TIED)
    phone = next(one for one in found if one.device == "OnePlus 12")
    assert phone.decode_speed.number == pytest.approx(published, rel=0.12)
    low, high = phone.decode_speed_low.number, phone.decode_speed_high.number
    assert low is not None
    assert high is not None
    assert low < published < high


def test_a_table_that_is_only_looked_up_is_not_read(measured: Made) -> None:
    table = 128256 * (2048 + 4)
    assert bytes_per_token(deployed(measured, "onnx", 1e9), TIED) == 1_000_000_000
    assert bytes_per_token(deployed(measured, "executorch", 1e9), TIED) == 1_000_000_000
    untied = TIED | {"tie_word_embeddings": False}
    assert bytes_per_token(deployed(measured, "onnx", 1e9), untied) == 1_000_000_000 - table
    small = {"embedding": {"bits": 4, "group_size": 32}}
    rest = 1_000_000_000 - 128256 * (1024 + 256)
    assert bytes_per_token(deployed(measured, "executorch", 1e9, small), untied) == rest
    assert bytes_per_token(deployed(measured, "onnx", 1e9), {}) is None
    assert estimates(deployed(measured, "onnx", 1e9), {}) == ()


def test_estimates_are_called_so_and_stand_apart(measured: Made, emulated: Made) -> None:
    for made in (measured, emulated):
        assert {one.decode_speed.execution for one in made.report.estimates} <= {"estimated"}
        assert all(
            figure.execution != "estimated" for figure in (made.report.speed.decode_speed, made.report.memory.rss)
        )
        assert "estimated" not in made.report.summary()
