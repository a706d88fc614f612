"""Reads a runner's event lines and holds them against the contract in docs/contracts.md.

A run is finished only by an `end` event that is the last line. Anything else, from a malformed line to a token too
many, is a BoaEdgeError that quotes what was found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from boa_edge.errors import BoaEdgeError
from boa_edge.visible import one_line
from devices.contract import Event, GenerateRequest, ScoreRequest

SCHEMA = 1
_QUOTED = 200
_INT64 = 1 << 63


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _count_or_null(value: Any) -> bool:
    return value is None or _count(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


# A further field is allowed (a newer runner may say more); a missing or wrong one is not.
FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "start": {
        "schema": _count,
        "runtime": _text,
        "runtime_version": _text,
        "mode": _text,
        "threads": _count,
        "tokens": _count,
    },
    "load": {"ns": _count},
    "prefill": {"run": _count, "warmup": _flag, "tokens": _count, "ns": _count},
    "token": {"run": _count, "warmup": _flag, "i": _count, "id": _count, "ns": _count},
    "score": {"tokens": _count, "ns": _count},
    "memory": {"peak_rss_bytes": _count_or_null, "rss_bytes": _count_or_null},
    "error": {"message": _text},
    "end": {"rc": _count},
}
# Fields that not every runner sends; one that is there must be right.
_OPTIONAL: dict[str, dict[str, Callable[[Any], bool]]] = {
    "start": {"cores": _count, "attention": _text},
    "memory": {"pss_bytes": _count_or_null, "pss_file_bytes": _count_or_null, "pss_anon_bytes": _count_or_null},
}


def parse_event(line: str, device: str) -> Event:
    """One line as a checked event. BoaEdgeError where it is not one."""

    def refuse(problem: str) -> NoReturn:
        raise BoaEdgeError(f"the runner printed {_quoted(line)}: {problem}", where=f"device {device}", fix=_FIX)

    try:
        event = json.loads(line, parse_constant=_no_constant, parse_int=_int64, parse_float=_finite)
        json.dumps(event, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        refuse("it holds half of a surrogate pair, which is no character")
    except ValueError as error:
        refuse(f"not a JSON object ({error})")
    except RecursionError:
        refuse("nested too deeply")
    if not isinstance(event, dict):
        refuse("not a JSON object")
    name = event.get("event")
    fields = FIELDS.get(name) if isinstance(name, str) else None
    if fields is None:
        refuse(f"unknown event {_quoted(name)}")
    for key, valid in fields.items():
        if key not in event:
            refuse(f"{name} has no field '{key}'")
        if not valid(event[key]):
            refuse(f"{name} has {key} = {_quoted(event[key])}")
    for key, valid in _OPTIONAL.get(event["event"], {}).items():
        if key in event and not valid(event[key]):
            refuse(f"{name} has {key} = {_quoted(event[key])}")
    return event


def _quoted(value: Any) -> str:
    """As Python writes it, in one short line."""
    if isinstance(value, str):
        return repr(value if len(value) <= _QUOTED else value[:_QUOTED] + "...")
    try:
        text = repr(value)
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "..."


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON knows")


def _int64(text: str) -> int:
    # Counted first: Python refuses to read thousands of digits, with a message that helps nobody here.
    if len(text) > 20 or not -_INT64 <= (value := int(text)) < _INT64:
        raise ValueError(f"{text[:20]}... is no 64-bit number" if len(text) > 20 else f"{text} is no 64-bit number")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


_FIX = "The runner does not keep the contract in docs/contracts.md; run `make setup` to rebuild it"


@dataclass
class EventStream:
    """The order and the number of events that one request must bring.

    Attributes:
        device: the name for error messages.
        request: what was asked.
        runtime: the runtime that must answer.
        runtime_version: the version that was installed for it, None where any will do.
        vocabulary: ids at or above this are refused.
        events: what has been accepted so far.
    """

    device: str
    request: GenerateRequest | ScoreRequest
    runtime: str
    runtime_version: str | None
    vocabulary: int
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._expected = _expected(self.request)
        self._next = 0

    @property
    def ended(self) -> bool:
        """Whether `end` has arrived."""
        return self._next == len(self._expected)

    @property
    def claimed_ns(self) -> int:
        """The sum of all that the runner timed. A token 0 carries its prefill's time, which counts once."""
        counted = [event for event in self.events if not (event["event"] == "token" and event["i"] == 0)]
        return sum(event["ns"] for event in counted if "ns" in FIELDS[event["event"]])

    def accept(self, line: str) -> Event:
        """Check one line and keep it. BoaEdgeError where it is not what must come now."""
        if self.ended:
            self._refuse(f"printed {line[:_QUOTED]!r} after its end event")
        event = parse_event(line, self.device)
        if event["event"] == "error":
            self.events.append(event)
            raise BoaEdgeError(f"the runner failed: {one_line(event['message'])}", where=f"device {self.device}")
        wanted = self._expected[self._next]
        for key, value in wanted.items():
            if event[key] != value:
                place = f"event {len(self.events) + 1} ({event['event']})"
                self._refuse(f"{place} has {key} = {_quoted(event[key])} where {value!r} was due")
        if event["event"] == "start":
            self._check_runtime(event)
            self._check_cores(event)
        if event["event"] == "token":
            self._check_token(event)
        self.events.append(event)
        self._next += 1
        return event

    def finish(self) -> None:
        """Call at the end of output: BoaEdgeError unless `end` was its last line."""
        if not self.ended:
            wanted = self._expected[self._next]["event"]
            self._refuse(f"its output ended after {len(self.events)} events, before '{wanted}' and 'end'")

    def _check_cores(self, event: Event) -> None:
        """The system takes a core off the list that it does not have, or that this user may not use, without a word."""
        asked = set(self.request.cores)
        if asked and event.get("cores", len(asked)) != len(asked):
            raise BoaEdgeError(
                f"of the cores {','.join(map(str, sorted(asked)))} it grants {event['cores']}",
                where=f"device {self.device}",
                fix="Choose --cores among those that the device has and lets this user have",
            )

    def _check_runtime(self, event: Event) -> None:
        if event["runtime"] != self.runtime:
            self._refuse(f"it speaks for runtime {_quoted(event['runtime'])}, not {self.runtime!r}")
        found = event["runtime_version"]
        if self.runtime_version is not None and found != self.runtime_version:
            other = one_line(found, 40)
            raise BoaEdgeError(
                f"the {self.runtime} runtime on the device has version {other}, installed is {self.runtime_version}",
                where=f"device {self.device}",
                fix="Run `make setup`",
            )

    def _check_token(self, event: Event) -> None:
        if event["id"] >= self.vocabulary:
            self._refuse(f"token id {event['id']} is outside the vocabulary of {self.vocabulary}")
        if event["i"] == 0 and event["ns"] != self.events[-1]["ns"]:
            self._refuse("token 0 does not carry its prefill's time")

    def _refuse(self, problem: str) -> NoReturn:
        raise BoaEdgeError(f"the runner broke its contract: {problem}", where=f"device {self.device}", fix=_FIX)


def _expected(request: GenerateRequest | ScoreRequest) -> list[dict[str, Any]]:
    """The whole sequence of events of a request, each with the fields that are known beforehand."""
    if isinstance(request, ScoreRequest):
        count, mode = len(request.tokens), "score"
    else:
        count, mode = len(request.prompt), "generate"
    events: list[dict[str, Any]] = [
        {"event": "start", "schema": SCHEMA, "mode": mode, "threads": request.threads, "tokens": count},
        {"event": "load"},
    ]
    if isinstance(request, ScoreRequest):
        events.append({"event": "score", "tokens": count})
    else:
        for run in range(request.warmup + request.repeats):
            same = {"run": run, "warmup": run < request.warmup}
            events.append({"event": "prefill", "tokens": count, **same})
            events += [{"event": "token", "i": i, **same} for i in range(request.new_tokens)]
    return [*events, {"event": "memory"}, {"event": "end", "rc": 0}]
