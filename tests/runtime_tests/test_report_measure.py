"""`measure` end to end with a fake device: what it asks for, what it reports, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import ValidationError
from report_fakes import (
    POSITIONS,
    Made,
    make,
    make_bundle,
    make_device,
    provenance,
    reference_tensors,
    shorten,
    write_manifest,
)

from boa_edge.errors import BoaEdgeError, UsageError
from devices.contract import Event, GenerateRequest, ScoreRequest
from runtime_tests import Figure, Report, measure, metrics
from runtime_tests.schema import make_schema, published_schema


def figures(value: Any) -> list[Figure]:
    """Every figure in a report."""
    if isinstance(value, Figure):
        return [value]
    if isinstance(value, tuple):
        return [found for item in value for found in figures(item)]
    if hasattr(value, "model_fields_set"):
        return [found for name in type(value).model_fields for found in figures(getattr(value, name))]
    return []


def test_report_validates_against_the_published_schema(emulated: Made, measured: Made, hostile: Made) -> None:
    validator = jsonschema.Draft202012Validator(published_schema())
    validator.check_schema(published_schema())
    for made in (emulated, measured, hostile):
        document = json.loads((made.directory / "report.json").read_text(encoding="utf-8"))
        validator.validate(document)
        assert document["schema_version"] == 1
        assert Report.model_validate(document) == made.report


def test_published_schema_is_the_one_the_classes_make() -> None:
    assert published_schema() == make_schema(), "run: python -m runtime_tests.schema"


def test_schema_refuses_a_figure_without_its_execution(emulated: Made) -> None:
    document = emulated.report.as_dict()
    del document["speed"]["load_time"]["execution"]
    with pytest.raises(jsonschema.ValidationError, match="execution"):
        jsonschema.validate(document, published_schema())


def test_figures_of_the_device_carry_its_execution(emulated: Made, measured: Made) -> None:
    for made, execution in ((emulated, "emulated"), (measured, "measured")):
        report = made.report
        parts = (report.speed, report.memory, report.fidelity.deployed, report.generation)
        assert {entry.execution for part in parts for entry in figures(part)} == {execution}
        assert {entry.execution for entry in figures((report.fidelity.original, report.quantization))} == {"measured"}


def test_fidelity_is_that_of_the_logits(emulated: Made) -> None:
    tensors, logits = reference_tensors(), make_device().logits
    scores, device = emulated.report.fidelity, emulated.report.fidelity.deployed
    assert scores.positions == POSITIONS
    assert device.perplexity.value == metrics.perplexity(logits, tensors["tokens"])
    assert scores.quantized.perplexity.value == metrics.perplexity(tensors["quantized_logits"], tensors["tokens"])
    assert scores.original.perplexity.value == metrics.perplexity(tensors["original_logits"], tensors["tokens"])
    assert device.kl_from_original is not None
    assert device.kl_from_original.value == metrics.mean_kl(tensors["original_logits"], logits)
    assert device.kl_from_quantized is not None
    assert device.kl_from_quantized.value == metrics.mean_kl(tensors["quantized_logits"], logits)


def test_speed_comes_from_the_counted_samples_alone(tmp_path: Path) -> None:
    def slow_warmup(events: list[Event]) -> list[Event]:
        return [{**event, "ns": 10**15} if event.get("warmup") else event for event in events]

    report = make(tmp_path, execution="measured", alter=slow_warmup).report
    speed, runs = report.speed, [run for run in report.samples.runs if not run.warmup]
    assert [run.warmup for run in report.samples.runs] == [True, False, False, False]
    assert report.settings.workload == "pp128/tg64"
    assert speed.token_time_p50.n == 3 * 63
    assert speed.first_inference is not None
    assert speed.first_inference.value == 1e9  # the warm-up's, and apart from the others
    assert speed.token_time_p99 is not None
    assert speed.token_time_p99.n == 3 * 63
    every = sorted(ns for run in runs for ns in run.token_ns)
    assert speed.token_time_p50.value == every[len(every) // 2] / 1e6
    rates = sorted(63 * 1e9 / sum(run.token_ns) for run in runs)
    assert speed.decode_speed.value == pytest.approx(rates[1])
    assert speed.time_to_first_token.value == sorted(run.prefill_ns for run in runs)[1] / 1e6
    assert speed.prefill_speed.number == pytest.approx(128 / 4.0, rel=1e-6)


def test_real_time_is_taken_of_the_standard_workload_and_greedy_text_of_the_reference_prompt(tmp_path: Path) -> None:
    device = make_device(execution="measured")
    report = measure(make_bundle(tmp_path / "bundle"), device, tmp_path / "report", threads=(1, 4, 2))
    generations = [request for request in device.requests if isinstance(request, GenerateRequest)]
    shapes = [(len(one.prompt), one.new_tokens, one.warmup, one.repeats, one.threads) for one in generations]
    assert shapes == [(8, 32, 0, 2, 1), (128, 64, 1, 3, 1), (128, 64, 1, 3, 4), (128, 64, 1, 3, 2)]
    tokens = reference_tensors()["tokens"].tolist()
    assert generations[1].prompt == tuple((tokens * 4)[:128])
    assert [row.threads for row in report.sweep] == [4, 2]
    assert report.sweep[0].decode_speed.n == 3
    assert len(report.generation.deployed.tokens) == 32
    assert len(report.samples.runs[0].tokens) == 64
    assert "--threads 1,4,2" in report.reproduce[2]
    assert "--workload pp128/tg64" in report.reproduce[2]
    assert "--profile" not in report.reproduce[2]
    assert report.memory.pss is not None
    assert report.memory.pss.value == "unavailable"  # this runner does not say


def test_a_workload_can_be_asked_for(tmp_path: Path) -> None:
    device = make_device()
    report = measure(make_bundle(tmp_path / "bundle"), device, tmp_path / "report", workload="pp20/tg3")
    assert (report.settings.workload, report.settings.greedy) == ("pp20/tg3", 32)
    assert report.speed.token_time_p50.n == 2


def test_defaults_depend_on_the_device_and_flags_win(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", tensors=long_reference())
    asked: list[tuple[int, int, int]] = []
    for index, (execution, flags) in enumerate(
        [("emulated", {}), ("measured", {}), ("emulated", {"warmup": 2, "repeats": 4, "score_tokens": 100})]
    ):
        device = make_device(execution=execution)
        measure(bundle, device, tmp_path / str(index), new_tokens=5, threads=2, **flags)
        score, generate = device.requests[:2]
        assert isinstance(score, ScoreRequest)
        assert isinstance(generate, GenerateRequest)
        assert (generate.new_tokens, generate.threads, score.threads) == (5, 2, 2)
        asked.append((len(score.tokens), generate.warmup, generate.repeats))
    assert asked == [(96, 0, 1), (120, 1, 3), (100, 2, 4)]


def long_reference() -> dict[str, Any]:
    tensors = reference_tensors()
    repeated = {name: np.concatenate([tensors[name]] * 3) for name in ("tokens", "original_logits", "quantized_logits")}
    return {**tensors, **repeated}


def test_divergence_is_located_and_its_margin_asked_of_the_device(emulated: Made, tmp_path: Path) -> None:
    generation = emulated.report.generation
    assert (generation.against_quantized.first_divergence, generation.against_quantized.matching) == (26, 26)
    assert generation.against_original.first_divergence == 20
    assert generation.divergence_margin is not None
    assert generation.divergence_margin.number is not None
    assert generation.divergence_margin.number > 0
    same = make(tmp_path, greedy=reference_tensors()["quantized_greedy"]).report
    assert same.generation.against_quantized.first_divergence is None
    assert same.generation.divergence_margin is None
    assert "All 32 greedily generated tokens equal" in same.notes[0]


def test_int8_activations_are_named_with_the_measured_kl(emulated: Made) -> None:
    kl = emulated.report.fidelity.deployed.kl_from_quantized
    assert kl is not None
    assert any("int8 activations" in note and f"{kl.number:.3g} nats" in note for note in emulated.report.notes)


def test_runs_that_differ_are_reported(tmp_path: Path) -> None:
    def change_last(events: list[Event]) -> list[Event]:
        place = max(index for index, event in enumerate(events) if event["event"] == "token")
        return [*events[:place], {**events[place], "id": 1}, *events[place + 1 :]]

    report = make(tmp_path, execution="measured", alter=change_last).report
    assert not report.generation.repeatable
    assert any("not repeatable" in note for note in report.notes)


@pytest.mark.parametrize("value", [None, 0])
def test_a_probe_without_an_answer_is_unavailable_and_never_zero(tmp_path: Path, value: int | None) -> None:
    def no_clock(events: list[Event]) -> list[Event]:
        return [{**event, "ns": 0} if event["event"] in ("prefill", "token") else event for event in events]

    made = make(tmp_path, alter=no_clock, memory={"peak_rss_bytes": value, "rss_bytes": value})
    speed = made.report.speed
    entries = (speed.token_time_p50, speed.decode_speed, speed.time_to_first_token, made.report.memory.peak_rss)
    assert {entry.value for entry in entries} == {"unavailable"}
    assert {entry.number for entry in entries} == {None}
    assert "unavailable" in made.html


def test_too_few_samples_give_no_p95(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    report = measure(bundle, make_device(), tmp_path / "report", new_tokens=8)
    assert report.speed.token_time_p95.value == "unavailable"
    assert "20 samples" in (report.speed.token_time_p95.note or "")
    assert report.speed.token_time_p50.number is not None


def test_one_token_is_enough(tmp_path: Path) -> None:
    report = measure(make_bundle(tmp_path / "bundle"), make_device(), tmp_path / "report", new_tokens=1)
    assert report.speed.decode_speed.value == "unavailable"
    assert report.speed.time_to_first_token.number is not None


@pytest.mark.parametrize("origin", [None, {}, {"comparison": [], "layers": []}, {"comparison": None, "source": None}])
def test_what_was_not_recorded_is_said_so(tmp_path: Path, origin: dict[str, Any] | None) -> None:
    made = make(tmp_path, bundle={"origin": origin})
    assert made.report.quantization.comparison == ()
    assert "Comparison with other methods: not recorded" in made.html
    jsonschema.validate(made.report.as_dict(), published_schema())


def test_evaluation_may_stand_in_three_places(tmp_path: Path) -> None:
    origin = provenance()
    evaluation = origin.pop("evaluation")
    rows = origin["comparison"]
    shapes = [
        {**origin, "evaluation": evaluation},
        {**origin, "comparison": [*rows, {"evaluation": evaluation}]},
        {**origin, "comparison": {"rows": rows, "evaluation": evaluation}},
    ]
    found = [make(tmp_path / str(i), bundle={"origin": shape}).report.quantization for i, shape in enumerate(shapes)]
    assert found[0] == found[1] == found[2]
    assert found[0].evaluation.tokens == 8192


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"comparison": [{"recipe": "w4g32-rtn"}]}, "comparison.0.method"),
        ({"comparison": [{"method": "rtn", "kl": -1}]}, "comparison.0.kl"),
        ({"layers": [{"name": "a", "bits": "four"}]}, "layers.0.bits"),
        ({"source": {"files": {"model.gguf": "short"}}}, "source.files.model.gguf"),
        ({"layers": 3}, "layers"),
        ({"comparison": [{"method": "rtn", "payload_bytes": 10**400}]}, "comparison.0.payload_bytes"),
    ],
)
def test_a_malformed_provenance_names_its_field(tmp_path: Path, change: dict[str, Any], where: str) -> None:
    with pytest.raises(BoaEdgeError, match=where):
        make(tmp_path, bundle={"origin": {**provenance(), **change}})
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"threads": 0}, "--threads"),
        ({"repeats": 0}, "--repeats"),
        ({"warmup": -1}, "--warmup"),
        ({"new_tokens": 0}, "--new-tokens"),
        ({"new_tokens": 5000}, "context of 2048"),
        ({"workload": "pp2000/tg64"}, "context of 2048"),
        ({"workload": "128/64"}, "no workload"),
        ({"threads": ()}, "--threads"),
        ({"threads": (1, 0)}, "--threads"),
        ({"threads": (2, 2)}, "twice"),
        ({"score_tokens": 1}, "--score-tokens"),
        ({"score_tokens": POSITIONS + 1}, f"only {POSITIONS} tokens"),
    ],
)
def test_settings_out_of_range_are_usage_errors(tmp_path: Path, flags: dict[str, int], message: str) -> None:
    device = make_device()
    with pytest.raises(UsageError, match=message):
        measure(make_bundle(tmp_path / "bundle"), device, tmp_path / "report", **flags)
    assert device.requests == []
    assert not (tmp_path / "report").exists()


def test_of_a_text_longer_than_the_context_as_much_is_scored_as_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, device = make_bundle(tmp_path / "bundle"), make_device()
    shorten(bundle, POSITIONS - 1)
    report = measure(bundle, device, tmp_path / "report", new_tokens=4)
    assert report.fidelity.positions == report.settings.score_tokens == POSITIONS - 1
    assert f"scoring the 39 tokens of the reference text that fit the bundle's context, not {POSITIONS}" in (
        capsys.readouterr().err
    )
    device.requests.clear()
    with pytest.raises(UsageError, match=r"--score-tokens: 40 exceed the context of 39 tokens\. At most 39 fit"):
        measure(bundle, device, tmp_path / "other", new_tokens=4, score_tokens=POSITIONS)
    assert device.requests == []


@pytest.mark.parametrize("name", ["peak_rss_bytes", "rss_bytes", "pss_bytes"])
def test_an_amount_beyond_all_memory_is_refused_in_the_first_run(tmp_path: Path, name: str) -> None:
    device = make_device(memory={"peak_rss_bytes": 10**9, "rss_bytes": 10**9, name: 10**400})
    with pytest.raises(BoaEdgeError, match=f"device arm64: the runner's `memory` event has {name} of more"):
        measure(make_bundle(tmp_path / "bundle"), device, tmp_path / "report")
    assert len(device.requests) == 1


def test_what_a_runner_calls_itself_cannot_spoil_the_report(tmp_path: Path) -> None:
    device = make_device()
    start = device._start

    def odd(mode: str, tokens: int) -> list[Event]:
        first, load = start(mode, tokens)
        return [{**first, "attention": "\ud800x", "runtime_version": "1\u202e"}, load]

    device._start = odd  # type: ignore[method-assign]
    report = measure(make_bundle(tmp_path / "bundle"), device, tmp_path / "report")
    assert report.device.attention == "⟨U+D800⟩x"
    assert report.device.runtime == "ONNX Runtime 1⟨U+202E⟩"


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e400])
def test_a_figure_has_room_for_64_bits(value: float) -> None:
    with pytest.raises(ValidationError):
        Figure(value=value, unit="bytes", execution="measured")
    assert Figure(value=2**63 - 1, unit="bytes", execution="measured").value == 2**63 - 1


def drop(kind: str) -> Callable[[list[Event]], list[Event]]:
    """Leave out the last event of a kind."""

    def alter(events: list[Event]) -> list[Event]:
        place = max(index for index, event in enumerate(events) if event["event"] == kind)
        return events[:place] + events[place + 1 :]

    return alter


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (drop("end"), "no `end` event"),
        (drop("token"), "31 tokens instead of"),
        (drop("prefill"), "0 counted runs"),
        (lambda events: [{**event, "id": None} if "id" in event else event for event in events], "id = None"),
        (lambda events: [{**event, "ns": -1} if "ns" in event else event for event in events], "ns = -1"),
    ],
)
def test_events_that_break_the_contract(tmp_path: Path, alter: Any, message: str) -> None:
    with pytest.raises(BoaEdgeError, match=message):
        make(tmp_path, alter=alter)
    assert not list(tmp_path.glob("*report*"))


def test_logits_that_cannot_be_compared(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    device = make_device()
    broken = device.logits.copy()
    broken[7, 3] = np.nan
    for logits, message in ((device.logits[:, :-1], "shape"), (broken, "not finite, first at position 7")):
        with pytest.raises(BoaEdgeError, match=message):
            measure(bundle, replace(device, logits=logits), tmp_path / "report")


def test_a_device_that_misstates_its_execution(tmp_path: Path) -> None:
    device = make_device(execution="measured")
    answer = device.run

    def lie(*arguments: Any) -> Any:
        return replace(answer(*arguments), execution="emulated")

    device.run = lie  # type: ignore[method-assign]
    with pytest.raises(BoaEdgeError, match="run was emulated"):
        measure(make_bundle(tmp_path / "bundle"), device, tmp_path / "report")


def test_a_damaged_bundle_is_not_run(tmp_path: Path) -> None:
    bundle, device = make_bundle(tmp_path / "bundle"), make_device()
    (bundle / "model.onnx.data").write_bytes(b"\x5b" * 300_000)
    with pytest.raises(BoaEdgeError, match=r"model\.onnx\.data"):
        measure(bundle, device, tmp_path / "report")
    assert device.requests == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("reference/reference.safetensors", "reference text is missing"), ("tokenizer.json", "tokenizer")],
)
def test_a_bundle_without_a_file_that_is_needed(tmp_path: Path, name: str, message: str) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / name).unlink()
    if name == "tokenizer.json":
        (bundle / "tokenizer_config.json").unlink()
        (bundle / "config.json").write_text("{}")
    write_manifest(bundle)
    with pytest.raises(BoaEdgeError, match=message):
        measure(bundle, make_device(), tmp_path / "report")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"original_logits": np.zeros((3, 64), np.float16)}, "original_logits has shape"),
        ({"quantized_logits": np.full((POSITIONS, 64), np.nan, np.float32)}, "not all finite"),
        ({"prompt": np.array([64])}, "prompt has an id outside"),
        ({"prompt": np.array([], np.int64)}, "prompt has shape"),
        ({"tokens": np.zeros(POSITIONS, np.float32)}, "tokens has shape"),
        ({"quantized_greedy": None}, "no tensor 'quantized_greedy'"),
    ],
)
def test_an_inconsistent_reference(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tensors = {name: array for name, array in {**reference_tensors(), **change}.items() if array is not None}
    with pytest.raises(BoaEdgeError, match=message):
        make(tmp_path, bundle={"tensors": tensors})


def test_an_existing_report_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    bundle, device = make_bundle(tmp_path / "bundle"), make_device()
    measure(bundle, device, tmp_path / "report")
    before, asked = (tmp_path / "report" / "report.json").read_text(), len(device.requests)
    with pytest.raises(UsageError, match="exists already"):
        measure(bundle, device, tmp_path / "report")
    assert len(device.requests) == asked
    measure(bundle, device, tmp_path / "report", overwrite=True, new_tokens=3)
    assert (tmp_path / "report" / "report.json").read_text() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "report"]


def test_a_device_is_opened_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devices.open_device", lambda name: make_device(name=name), raising=False)
    assert measure(make_bundle(tmp_path / "bundle"), "arm64", tmp_path / "report").device.name == "arm64"


def test_summary_is_compact_json_with_labelled_figures(emulated: Made) -> None:
    summary = emulated.report.summary()
    assert len(json.dumps(summary)) < 4000
    assert summary["kl"]["execution"] == "emulated"
    assert summary["size"]["execution"] == "measured"
    assert {"perplexity", "top1", "decode_speed", "token_time_p95", "peak_rss"} <= set(summary)
    assert "latency" not in json.dumps(summary)


def test_the_original_stands_first_even_without_a_row_of_its_own(tmp_path: Path) -> None:
    origin = provenance()
    origin["comparison"] = origin["comparison"][1:]
    origin["evaluation"] |= {"original_perplexity": 28.8, "overlaps_calibration": True}
    made = make(tmp_path, bundle={"origin": origin})
    first = made.report.quantization.comparison[0]
    assert (first.method, first.perplexity and first.perplexity.value) == ("original", 28.8)
    assert first.payload_size is None
    assert "has seen this text, so its errors here are optimistic" in made.html


def test_the_recipe_has_a_name(tmp_path: Path, emulated: Made) -> None:
    assert emulated.report.deployed.recipe_name == "w4g32-boa"
    named = make(tmp_path, bundle={"origin": {**provenance(), "recipe": "w4g32-boa-rotate"}})
    assert named.report.deployed.recipe_name == "w4g32-boa-rotate"


def test_numbers_that_overflowed_are_not_recorded(tmp_path: Path) -> None:
    origin = provenance()
    origin["comparison"][1]["perplexity"] = float("inf")
    row = make(tmp_path, bundle={"origin": origin}).report.quantization.comparison[1]
    assert row.perplexity is None
    assert row.kl is not None


def test_the_embedded_model_is_named_as_the_command_takes_it(tmp_path: Path) -> None:
    origin = provenance() | {"source": {"model": "default (SmolLM2-135M-Instruct)", "files": {}}}
    report = make(tmp_path, bundle={"origin": origin}).report
    assert report.reproduce[0].startswith("boa-edge quantize default --recipe ")
