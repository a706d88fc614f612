"""`boa-edge compare`: changes, their noise, and the conditions that gate a team's CI."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_fakes import make, make_bundle, make_device, provenance
from rich.console import Console

from boa_edge.errors import BoaEdgeError, UsageError
from devices.contract import Event
from runtime_tests.comparison import Comparison, compare, print_comparison
from runtime_tests.comparison.conditions import parse
from runtime_tests.comparison.figures import BY_NAME
from runtime_tests.comparison.noise import (
    Interval,
    change_interval,
    paired_change_interval,
    quantile_interval,
)
from runtime_tests.hardware import difference
from runtime_tests.history import arrange
from runtime_tests.measuring import measure
from runtime_tests.model import Report, RunSamples, Samples
from runtime_tests.reading import read_report


def slower(share: float) -> Any:
    """Every token takes `share` longer."""

    def alter(events: list[Event]) -> list[Event]:
        return [
            {**event, "ns": round(event["ns"] * (1 + share))} if event["event"] == "token" and event["i"] else event
            for event in events
        ]

    return alter


def uneven(*factors: float) -> Any:
    """Every run takes a factor of its own as long; the first is the warm-up."""

    def alter(events: list[Event]) -> list[Event]:
        return [
            {**event, "ns": round(event["ns"] * factors[event["run"]])}
            if event["event"] == "token" and event["i"]
            else event
            for event in events
        ]

    return alter


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("before"), execution="measured", name="host").directory


def rows(before: Path, after: Path, fail_on: str = "") -> dict[str, Any]:
    return compare(before, after, fail_on=fail_on).as_dict()


def test_a_report_equals_itself(before: Path) -> None:
    found = compare(before, before / "report.json", fail_on="decode_tok_s<-0%,kl>+0%,size_mb>+0,token_p95_ms>+0%")
    assert not found.failed
    # The one is counted in emulation only, the other where there is a battery.
    recorded = [row for row in found.rows if row.figure.name not in ("instructions", "energy_j")]
    assert {row.verdict for row in recorded} == {"same"}
    assert all(row.change == 0 for row in recorded)


def test_slower_tokens_are_a_regression_of_exactly_that_size(before: Path, tmp_path: Path) -> None:
    after = make(tmp_path, execution="measured", name="host", alter=slower(0.25)).directory
    found = rows(before, after, "decode_tok_s<-5%,kl>+10%")
    decode = found["figures"]["decode_tok_s"]
    assert decode["change"] == pytest.approx(1 / 1.25 - 1, abs=1e-3)
    assert decode["verdict"] == "worse"
    assert found["figures"]["kl"]["verdict"] == "same"
    assert found["regressions"] == ["decode_tok_s<-5%"]
    assert rows(after, before, "decode_tok_s<-5%")["regressions"] == []
    assert rows(after, before)["figures"]["decode_tok_s"]["verdict"] == "better"


def test_a_change_within_the_runs_own_spread_is_excused_and_said(tmp_path: Path) -> None:
    def wild(name: str, alter: Any) -> Path:
        return make(tmp_path / name, execution="measured", name="host", alter=alter).directory

    first, second = wild("a", uneven(1, 0.8, 1, 1.3)), wild("b", uneven(1, 1.4, 1.15, 0.9))
    found = rows(first, second, "decode_tok_s<-5%")
    decode = found["figures"]["decode_tok_s"]
    assert decode["change"] < -0.1
    assert decode["interval"][0] < 0 < decode["interval"][1]
    assert decode["verdict"] == "within noise"
    assert found["regressions"] == []
    assert found["within_noise"] == ["decode_tok_s<-5%"]


def test_one_disturbed_run_of_many_is_no_change_of_all(tmp_path: Path) -> None:
    """What is compared is what the interval is of: of ten runs that are 4 % faster, one alone was disturbed."""

    def ten(name: str, *factors: float) -> Path:
        device = make_device(execution="measured", name="host", alter=uneven(*factors))
        bundle = make_bundle(tmp_path / name / "bundle", origin=provenance())
        measure(bundle, device, tmp_path / name / "report", repeats=10)
        return tmp_path / name / "report"

    found = rows(ten("a", *[1.0] * 11), ten("b", *[0.96] * 10, 2.0), "token_p95_ms>+5%")
    figure = found["figures"]["token_p95_ms"]
    assert figure["change"] == pytest.approx(-0.04, abs=0.01)
    assert figure["interval"][0] <= figure["change"] <= figure["interval"][1]
    assert (figure["verdict"], found["regressions"]) == ("better", [])


def test_emulated_times_are_not_held_against_a_phones(before: Path, tmp_path: Path) -> None:
    emulated = make(tmp_path).directory
    found = rows(before, emulated)["figures"]
    assert found["decode_tok_s"]["verdict"] == "not comparable"
    assert "change" not in found["decode_tok_s"]
    assert found["size_mb"]["verdict"] == "same"
    with pytest.raises(UsageError, match="measured against emulated"):
        compare(before, emulated, fail_on="decode_tok_s<-5%")


def phone(directory: Path, **facts: str) -> Path:
    return make(directory, execution="measured", name="android", facts=facts).directory


def test_one_name_can_stand_for_two_phones(tmp_path: Path) -> None:
    first = phone(tmp_path / "a", manufacturer="Google", model="Pixel 8", soc="Tensor G3")
    other = phone(tmp_path / "b", manufacturer="Google", model="Pixel 6", soc="Tensor")
    silent = phone(tmp_path / "c", manufacturer="Google", model="denied", soc="unavailable")
    found = rows(first, other)["figures"]
    assert found["decode_tok_s"]["reason"] == "model Pixel 8 against Pixel 6"
    assert found["kl"]["verdict"] == "same"  # what another processor makes of it is a fair question
    with pytest.raises(UsageError, match="Pixel 8 against Pixel 6"):
        compare(first, other, fail_on="decode_tok_s<-5%")
    assert rows(first, silent)["figures"]["decode_tok_s"]["verdict"] == "same"
    assert len(arrange([read_report(first), read_report(other)])) == 2


def changed(directory: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A report with something else in it."""
    document = json.loads((directory / "report.json").read_text())
    change(document)
    target.mkdir()
    (target / "report.json").write_text(json.dumps(document))
    return target


def test_hardware_is_told_apart_by_its_cores_and_memory() -> None:
    small = {"cpu": "Xeon", "cpu_parts": ["1:3"] * 4, "cores": 4, "usable_cores": 4, "memory_bytes": 7_700_000_000}
    assert difference(small, small | {"memory_bytes": 7_650_000_000}) is None
    assert difference(small, {"cores": "denied", "cpu_parts": "unavailable", "memory_bytes": None}) is None
    for change, words in (
        ({"cores": 8}, "cores 4 against 8"),
        ({"usable_cores": 1}, "usable_cores 4 against 1"),
        ({"cpu_parts": ["1:3", "1:4"] * 2}, "cpu_parts 4 x 1:3 against 2 x 1:3, 2 x 1:4"),
        ({"memory_bytes": 3_900_000_000}, "memory 8 GiB against 4 GiB"),
    ):
        assert difference(small, small | change) == words


def test_other_warm_ups_are_another_question(before: Path, tmp_path: Path) -> None:
    cold = changed(before, tmp_path / "cold", lambda document: document["settings"].update(warmup=0))
    found = rows(before, cold)["figures"]
    assert found["ttft_ms"]["reason"] == found["peak_rss_mb"]["reason"] == "1 warm-up runs against 0"
    assert found["kl"]["verdict"] == "same"


def test_other_cores_or_another_text_are_other_questions(before: Path, tmp_path: Path) -> None:
    big = changed(before, tmp_path / "big", lambda document: document["settings"].update(cores=[4, 5]))
    found = rows(before, big)["figures"]
    assert found["decode_tok_s"]["reason"] == "cores any against 4,5"
    assert found["kl"]["verdict"] == "same"

    def reread(document: dict[str, Any]) -> None:
        document["fidelity"]["original"]["perplexity"]["value"] *= 1.01

    found = rows(before, changed(before, tmp_path / "reread", reread))["figures"]
    assert found["kl"]["reason"] == "other reference texts"
    assert found["decode_tok_s"]["verdict"] == "same"


def printed(found: Comparison, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_comparison(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_a_terminal_and_says_each_obstacle_once(before: Path, tmp_path: Path) -> None:
    emulated = make(tmp_path).directory
    for other in (before, emulated):
        text = printed(compare(before, other, fail_on="size_mb>+0%"))
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        assert "Energy per token" not in text  # neither has it
    assert text.count("measured against emulated") == 1
    assert "Decode speed" in text.partition("not comparable: ")[2]


def test_two_emulated_reports_are_never_shown_as_a_devices_own_time(tmp_path: Path) -> None:
    first, second = (make(tmp_path / name, name="android").directory for name in "ab")
    found = compare(first, second)
    assert max(map(len, printed(found).splitlines())) <= 80
    words = printed(found, 160)
    assert words.count("android (emulated)") == 2
    for label in ("Emulated load time", "Emulated time to first token", "Decode speed in emulated time"):
        assert label in words
    assert "Token time" not in words
    assert "Token latency" not in words


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("decode<-5%", "Did you mean decode_tok_s"),
        ("kl", "no condition"),
        ("kl>-5%", "has not changed"),
        ("decode_tok_s<5%", "has not changed"),
        ("kl>+x%", "no condition"),
        (",", "nothing could fail.*Write NAME<-N%"),
        (" ", "nothing could fail"),
        ("kl<-10%", r"improvements alone: less is better\. Write kl>\+10%"),
        ("size_mb<-1.5", r"Write size_mb>\+1\.5"),
        ("decode_tok_s>+5%", r"improvements alone: more is better\. Write decode_tok_s<-5%"),
    ],
)
def test_conditions_that_cannot_be_meant_are_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(text)


def test_conditions_in_percent_and_in_units() -> None:
    speed, size = parse(" decode_tok_s<-5% , size_mb>+1.5,")
    assert (speed.limit, speed.relative, speed.falls) == (-0.05, True, True)
    assert (size.limit, size.relative, size.falls) == (1.5, False, False)
    assert speed.holds(-0.06)
    assert not speed.holds(-0.05)


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"speed": 3}, {"surprise": 1}])
def test_a_report_that_is_none_is_one_line(before: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    document = json.loads((before / "report.json").read_text()) | change
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(BoaEdgeError, match=r"report\.json"):
        compare(before, tmp_path)


@pytest.mark.parametrize(("percent", "count"), [(50, 5), (50, 30), (95, 40), (95, 200)])
def test_the_interval_covers_the_true_quantile_as_often_as_it_says(percent: float, count: int) -> None:
    noise = np.random.default_rng(7)
    truth = float(np.quantile(noise.exponential(size=1_000_000), percent / 100))
    hits = 0
    for _ in range(800):
        interval = quantile_interval(noise.exponential(size=count).tolist(), percent)
        assert interval is not None
        hits += interval.low <= truth <= interval.high
    # What the extremes of so few samples can cover at best, else 95 %.
    possible = 1 - (percent / 100) ** count - (1 - percent / 100) ** count
    assert hits / 800 >= min(0.95, possible) - 0.03


def timed(report: Report, runs: int, noise: np.random.Generator) -> Report:
    """63 tokens a run, each run by 3 % of its own faster or slower, each token by 2 %."""
    found = []
    for index in range(runs):
        ns = 10e6 * (1 + noise.normal() * 0.03) * (1 + noise.normal(size=63) * 0.02)
        tokens = tuple(map(round, ns.tolist()))
        found.append(RunSamples(run=index, warmup=False, prefill_ns=1, token_ns=tokens, tokens=()))
    return report.model_copy(update={"samples": Samples(execution="measured", load_ns=(), runs=tuple(found))})


# Of three runs against three, no interval can do better than 1 in 10 whatever the distribution.
@pytest.mark.parametrize(("runs", "rate"), [(3, 0.1), (6, 0.05), (10, 0.05)])
@pytest.mark.parametrize("name", ["token_p50_ms", "token_p95_ms"])
def test_tokens_of_one_run_are_no_independent_samples(before: Path, name: str, runs: int, rate: float) -> None:
    report, noise = read_report(before), np.random.default_rng(1)
    called = 0
    for _ in range(400):
        first, second = (quantile_interval(BY_NAME[name].samples(timed(report, runs, noise)), 50) for _ in range(2))
        assert first is not None
        assert second is not None
        change = change_interval(first, second)
        assert change is not None
        called += not change.low <= 0 <= change.high
    assert called / 400 < rate + 0.04


def test_the_figure_lies_within_the_noise_of_its_runs(before: Path) -> None:
    report = read_report(before)
    for name in ("token_p50_ms", "token_p95_ms"):
        samples = BY_NAME[name].samples(report)
        value = BY_NAME[name].value(report)
        assert len(samples) == report.settings.repeats
        assert value is not None
        assert min(samples) <= value <= max(samples)


def test_noise_of_one_sample_is_unknown_and_of_two_their_range() -> None:
    assert quantile_interval([3.0], 50) is None
    assert quantile_interval([3.0, 1.0], 50) == Interval(1.0, 3.0)
    assert change_interval(Interval(1, 2), Interval(2, 2)) == Interval(0.0, 1.0)
    assert change_interval(Interval(0, 2), Interval(2, 2)) is None


def test_the_noise_of_a_mean_over_the_same_places_is_that_of_their_differences() -> None:
    noise = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        before = noise.exponential(size=96)
        after = before * 1.1 + noise.normal(size=96) * 0.05
        interval = paired_change_interval(before.tolist(), after.tolist())
        assert interval is not None
        assert interval.high - interval.low < 0.1  # though the places themselves differ by their own size
        hits += interval.low <= 0.1 <= interval.high
    assert hits / 400 > 0.92
    assert paired_change_interval([1.0] * 19, [1.0] * 19) is None
    assert paired_change_interval([1.0] * 30, [1.0] * 29) is None
    assert paired_change_interval([0.0] * 30, [1.0] * 30) is None


def test_a_kl_that_other_roundings_explain_is_no_regression(before: Path, tmp_path: Path) -> None:
    """Logits with noise of their own at every position: the mean moves, and the positions say that it means nothing."""
    device = make_device()
    noise = np.random.default_rng(5).normal(size=device.logits.shape) * 0.02
    after = make(tmp_path, execution="measured", name="host", logits=(device.logits + noise).astype(np.float32))
    found = rows(before, after.directory, "kl>+0%")
    kl = found["figures"]["kl"]
    assert kl["change"] != 0
    assert kl["interval"][0] < 0 < kl["interval"][1]
    assert kl["verdict"] == "within noise"
    assert found["regressions"] == []
    worse = make(tmp_path / "worse", execution="measured", name="host", logits=(device.logits * 0.6).astype(np.float32))
    assert rows(before, worse.directory, "kl>+10%")["regressions"] == ["kl>+10%"]
