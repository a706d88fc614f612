"""Instructions are those of the generation that was timed, or the report says of which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from report_fakes import PROMPT, FakeDevice, make_bundle, make_device

from boa_edge.errors import UsageError
from devices.contract import GenerateRequest, RunResult, ScoreRequest
from runtime_tests import Report, measure
from runtime_tests.comparison import compare
from runtime_tests.history import kind_of

Request = GenerateRequest | ScoreRequest


def counting(counted: Callable[[Request], bool] = lambda _: True) -> FakeDevice:
    """A million instructions for each token of the prompt; for each after it, ten thousand more a place."""
    device = make_device()
    answer = device.run

    def run(bundle: Path, request: Request, on_event: object = None) -> RunResult:
        result = answer(bundle, request)
        counts, total, place = [], 0, 0
        for event in result.events:
            if event["event"] == "prefill":
                place = event["tokens"]
                total += 1_000_000 * place
            elif event["event"] == "token" and event["i"]:
                place += 1
                total += 1_000_000 + 10_000 * place
            counts.append(total)
        return replace(result, instructions=tuple(counts) if counted(request) else None)

    device.run = run  # type: ignore[method-assign]
    return device


def counted_of(report: Report) -> tuple[object, ...]:
    assert report.cost is not None
    return report.counted, report.cost.instructions_prompt.value, report.cost.instructions_per_token.n


def test_they_are_counted_in_the_workload(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    asked = {"workload": "pp512/tg16"}
    few = measure(bundle, counting(), tmp_path / "few", new_tokens=4, **asked)
    many = measure(bundle, counting(), tmp_path / "many", new_tokens=32, **asked)
    assert counted_of(few) == counted_of(many) == ("pp512/tg16", 512_000_000, 15)
    found = compare(tmp_path / "few", tmp_path / "many", fail_on="instructions>+0.5%")
    assert {row.figure.name: row.verdict for row in found.rows}["instructions"] == "same"
    page = (tmp_path / "few" / "report.html").read_text()
    assert '<th scope="row">Instructions for the prompt</th>' in page
    assert "from event to event, of pp512/tg16." in page


def test_with_one_thread_where_the_workload_had_several(tmp_path: Path) -> None:
    device = counting(lambda request: request.threads == 1)
    report = measure(make_bundle(tmp_path / "bundle"), device, tmp_path / "report", threads=(2, 1), workload="pp9/tg3")
    assert counted_of(report) == ("pp9/tg3", 9_000_000, 2)


def test_counts_of_another_generation_say_so(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    device = counting(lambda request: isinstance(request, GenerateRequest) and len(request.prompt) == PROMPT)
    other = measure(bundle, device, tmp_path / "other", workload="pp20/tg3")
    assert counted_of(other)[:2] == ("pp8/tg32", 8_000_000)
    page = (tmp_path / "other" / "report.html").read_text()
    assert '<th scope="row">Instructions for the prompt (of pp8/tg32)</th>' in page
    workload = measure(bundle, counting(), tmp_path / "workload", workload="pp20/tg3")
    with pytest.raises(UsageError, match="counted in pp8/tg32 against pp20/tg3"):
        compare(tmp_path / "other", tmp_path / "workload", fail_on="instructions>+1%")
    assert kind_of(other) != kind_of(workload)


def test_reports_from_before_it_was_written_down_counted_the_greedy_continuation(tmp_path: Path) -> None:
    report = measure(make_bundle(tmp_path / "bundle"), counting(), tmp_path / "report", workload="pp20/tg3")
    assert report.cost is not None
    old = report.cost.model_copy(update={"prompt_tokens": None, "new_tokens": None})
    assert report.model_copy(update={"cost": old}).counted == "pp8/tg32"
