"""A runner's output counts only where every line of it is the one that was due."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boa_edge.errors import BoaEdgeError
from devices.contract import GenerateRequest, ScoreRequest
from devices.events import EventStream, parse_event

Request = GenerateRequest | ScoreRequest
GENERATE = GenerateRequest(prompt=(1, 2, 3), new_tokens=2, warmup=1, repeats=2)
SCORE = ScoreRequest(tokens=(1, 2))


def script(request: Request) -> list[dict[str, Any]]:
    """What a right runner prints."""
    score = isinstance(request, ScoreRequest)
    count = len(request.tokens if isinstance(request, ScoreRequest) else request.prompt)
    events: list[dict[str, Any]] = [
        {
            "event": "start",
            "schema": 1,
            "runtime": "onnx",
            "runtime_version": "1.2.3",
            "mode": "score" if score else "generate",
            "threads": 1,
            "tokens": count,
        },
        {"event": "load", "ns": 5},
    ]
    if isinstance(request, GenerateRequest):
        for run in range(request.warmup + request.repeats):
            same = {"run": run, "warmup": run < request.warmup}
            events.append({"event": "prefill", "tokens": count, "ns": 9, **same})
            events += [{"event": "token", "i": i, "id": 4, "ns": 9, **same} for i in range(request.new_tokens)]
    else:
        events.append({"event": "score", "tokens": count, "ns": 9})
    return [*events, {"event": "memory", "peak_rss_bytes": 1, "rss_bytes": None}, {"event": "end", "rc": 0}]


def feed(request: Request, lines: list[str]) -> EventStream:
    stream = EventStream("dev", request, "onnx", "1.2.3", vocabulary=10)
    for line in lines:
        stream.accept(line)
    stream.finish()
    return stream


def lines_of(request: Request) -> list[str]:
    return [json.dumps(event) for event in script(request)]


@pytest.mark.parametrize("request_", [GENERATE, SCORE])
def test_a_right_run_is_accepted_whole(request_: Request) -> None:
    assert feed(request_, lines_of(request_)).events == script(request_)


@given(st.sampled_from([GENERATE, SCORE]), st.data())
def test_a_lost_line_never_passes(request_: Request, data: st.DataObject) -> None:
    lines = lines_of(request_)
    del lines[data.draw(st.integers(0, len(lines) - 1))]
    with pytest.raises(BoaEdgeError):
        feed(request_, lines)


@given(st.sampled_from([GENERATE, SCORE]), st.data())
def test_a_repeated_line_never_passes(request_: Request, data: st.DataObject) -> None:
    lines = lines_of(request_)
    at = data.draw(st.integers(0, len(lines) - 1))
    with pytest.raises(BoaEdgeError):
        feed(request_, [*lines[: at + 1], *lines[at:]])


@given(st.data())
def test_a_missing_field_never_passes(data: st.DataObject) -> None:
    events = script(GENERATE)
    event = events[data.draw(st.integers(0, len(events) - 1))]
    del event[data.draw(st.sampled_from(sorted(event)))]
    with pytest.raises(BoaEdgeError):
        feed(GENERATE, [json.dumps(item) for item in events])


@given(st.text(max_size=200))
def test_any_other_text_is_one_clear_line(text: str) -> None:
    with pytest.raises(BoaEdgeError, match=r"^device dev: .") as error:
        parse_event(text, "dev")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", "not a JSON object"),
        ("ready", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"event":"load","ns":1', "not a JSON object"),
        ('{"event":"party"}', "unknown event 'party'"),
        ('{"event":["load"]}', "unknown event"),
        ('{"ns":1}', "unknown event None"),
        ('{"event":"load"}', "no field 'ns'"),
        ('{"event":"load","ns":-1}', "ns = -1"),
        ('{"event":"load","ns":1.5}', "ns = 1.5"),
        ('{"event":"load","ns":true}', "ns = True"),
        ('{"event":"load","ns":null}', "ns = None"),
        ('{"event":"load","ns":NaN}', "NaN is not a number"),
        ('{"event":"load","ns":Infinity}', "Infinity is not a number"),
        ('{"event":"memory","peak_rss_bytes":"1","rss_bytes":1}', "peak_rss_bytes"),
        ('{"event":"error","message":""}', "message"),
        ('{"event":"load","ns":9223372036854775808}', "9223372036854775808 is no 64-bit number"),
        ('{"event":"load","ns":1' + 5000 * "0" + "}", "is no 64-bit number"),
        ('{"event":"load","ns":1,"more":[1e400]}', "1e400 is too large a number"),
        ('{"event":"memory","peak_rss_bytes":1,"rss_bytes":1,"pss_bytes":"1"}', "pss_bytes = '1'"),
        ('{"event":"load","ns":1,"more":["\\ud800"]}', "half of a surrogate pair"),
        ('{"event":"load","ns":' + 900 * "[" + 900 * "]" + "}", "ns = [[["),
        ("[" * 100_000, "not a JSON object"),
    ],
)
def test_a_wrong_line_is_quoted_with_what_is_wrong(line: str, found: str) -> None:
    with pytest.raises(BoaEdgeError) as error:
        parse_event(line, "dev")
    message = str(error.value)
    assert len(message) < 1000
    if found == "not a JSON object" and line.startswith("[["):
        return
    assert found in message


@pytest.mark.parametrize(
    ("index", "change", "found"),
    [
        (0, {"schema": 2}, "schema = 2 where 1 was due"),
        (0, {"mode": "score"}, "mode"),
        (0, {"threads": 2}, "threads"),
        (0, {"tokens": 4}, "tokens = 4 where 3 was due"),
        (0, {"runtime": "other"}, "speaks for runtime 'other'"),
        (0, {"runtime_version": "1.2.4"}, "version 1.2.4, installed is 1.2.3"),
        (2, {"run": 1}, "run = 1 where 0 was due"),
        (2, {"warmup": False}, "warmup"),
        (3, {"i": 1}, "i = 1 where 0 was due"),
        (3, {"ns": 8}, "prefill's time"),
        (3, {"id": 10}, "outside the vocabulary of 10"),
        (-1, {"rc": 3}, "rc = 3 where 0 was due"),
    ],
)
def test_a_line_that_does_not_fit_the_request_is_refused(index: int, change: dict[str, Any], found: str) -> None:
    events = script(GENERATE)
    events[index].update(change)
    with pytest.raises(BoaEdgeError, match="device dev") as error:
        feed(GENERATE, [json.dumps(event) for event in events])
    assert found in str(error.value)


def test_output_after_end_is_refused() -> None:
    with pytest.raises(BoaEdgeError, match="after its end event"):
        feed(SCORE, [*lines_of(SCORE), '{"event":"load","ns":1}'])


def test_an_error_event_passes_on_its_message() -> None:
    with pytest.raises(BoaEdgeError, match="the runner failed: no such op"):
        feed(SCORE, [lines_of(SCORE)[0], '{"event":"error","message":"no such op"}'])


def test_an_error_event_forges_no_line() -> None:
    event = {"event": "error", "message": "no\nerror: forged\x1b[2J\u2028" + "x" * 10_000}
    with pytest.raises(BoaEdgeError) as error:
        feed(SCORE, [lines_of(SCORE)[0], json.dumps(event)])
    assert "no⟨U+000A⟩error: forged⟨U+001B⟩[2J⟨U+2028⟩xxx" in str(error.value)
    assert len(str(error.value)) < 1000


def test_only_a_token_0_counts_with_its_prefill() -> None:
    events = script(GENERATE)
    events[1] |= {"ns": 100, "i": 0}
    events[-2]["ns"] = "no time of the contract"
    assert feed(GENERATE, [json.dumps(event) for event in events]).claimed_ns == 100 + 3 * (9 + 9)
