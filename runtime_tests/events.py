"""The runner's events, checked and gathered into runs. Every time is in nanoseconds of the runner's own clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from boa_edge.errors import BoaEdgeError
from devices.contract import Event, RunResult
from runtime_tests.figure import MOST
from runtime_tests.labels import RUNTIMES, visible


@dataclass(frozen=True)
class GenerationRun:
    """One generation: the prompt in one call, then a token a call.

    Attributes:
        index: which run, counted by the runner.
        warmup: it does not count.
        prefill_ns: from the call to the first token's id.
        tokens: generated ids.
        token_ns: of each token after the first: one less than `tokens`.
    """

    index: int
    warmup: bool
    prompt_tokens: int
    prefill_ns: int
    tokens: tuple[int, ...]
    token_ns: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """All runs of one generation request, and what the process said of itself."""

    load_ns: int | None
    runs: tuple[GenerationRun, ...]
    peak_rss_bytes: int | None
    rss_bytes: int | None
    pss_bytes: int | None = None
    pss_file_bytes: int | None = None
    pss_anon_bytes: int | None = None

    @property
    def counted(self) -> tuple[GenerationRun, ...]:
        """The runs that are not warm-ups."""
        return tuple(run for run in self.runs if not run.warmup)


def load_time(result: RunResult) -> int | None:
    """Nanoseconds that the runtime took to load the model, if the runner told."""
    return _amount(_one(result.events, "load"), "ns")


def runtime_of(result: RunResult) -> str | None:
    """The runtime and its version, as the runner named them, e.g. `ExecuTorch 1.5.1`."""
    start = _one(result.events, "start") or {}
    name, version = start.get("runtime"), start.get("runtime_version")
    if not isinstance(name, str) or not isinstance(version, str):
        return None
    return visible(f"{RUNTIMES.get(name, name)} {version}")


def attention_of(result: RunResult) -> str | None:
    """Whose attention kernels ran, where the runner says that they were not the runtime's."""
    found = (_one(result.events, "start") or {}).get("attention")
    return visible(found) if isinstance(found, str) else None


def gather_generation(
    result: RunResult, *, prompt_tokens: int, new_tokens: int, warmup: int, repeats: int
) -> Generation:
    """The runs of a GenerateRequest.

    Raises:
        BoaEdgeError: the events are not those of the request: a run or a token is missing or out of order.
    """
    _check_end(result.events)
    runs: list[GenerationRun] = []
    for event in result.events:
        if event.get("event") == "prefill":
            tokens = [item for item in result.events if item.get("event") == "token" and _same_run(item, event)]
            runs.append(_run(event, tokens, prompt_tokens, new_tokens))
    counts = (sum(run.warmup for run in runs), sum(not run.warmup for run in runs))
    if counts != (warmup, repeats):
        raise BoaEdgeError(
            f"the runner reported {counts[0]} warm-up and {counts[1]} counted runs instead of {warmup} and {repeats}"
        )
    memory = _one(result.events, "memory")
    return Generation(
        load_ns=load_time(result),
        runs=tuple(runs),
        peak_rss_bytes=_amount(memory, "peak_rss_bytes"),
        rss_bytes=_amount(memory, "rss_bytes"),
        pss_bytes=_amount(memory, "pss_bytes"),
        pss_file_bytes=_amount(memory, "pss_file_bytes"),
        pss_anon_bytes=_amount(memory, "pss_anon_bytes"),
    )


def check_numbers(events: Sequence[Event], device: str) -> None:
    """BoaEdgeError where a number is larger than any time or memory can be."""
    for event in events:
        for key, value in event.items():
            if isinstance(value, int) and abs(value) > MOST:
                said = f"the runner's `{event.get('event')}` event has {visible(key)} of more than {MOST:,}"
                fix = "No time and no memory is as large, so the runner misreports it: rebuild it, or run `make setup`"
                raise BoaEdgeError(said, where=f"device {visible(device)}", fix=fix)


def score_time(result: RunResult) -> int | None:
    """Nanoseconds of the teacher-forced call, if the runner told."""
    return _amount(_one(result.events, "score"), "ns")


def _run(prefill: Event, tokens: Sequence[Event], prompt_tokens: int, new_tokens: int) -> GenerationRun:
    where = f"run {prefill.get('run')}"
    if [event.get("i") for event in tokens] != list(range(new_tokens)):
        raise BoaEdgeError(f"the runner reported {len(tokens)} tokens instead of 0 to {new_tokens - 1}", where=where)
    if prefill.get("tokens") != prompt_tokens:
        raise BoaEdgeError(f"the runner read {prefill.get('tokens')} prompt tokens, not {prompt_tokens}", where=where)
    return GenerationRun(
        index=_whole(prefill, "run"),
        warmup=bool(prefill.get("warmup", False)),
        prompt_tokens=prompt_tokens,
        prefill_ns=_whole(prefill, "ns"),
        tokens=tuple(_whole(event, "id") for event in tokens),
        token_ns=tuple(_whole(event, "ns") for event in tokens[1:]),
    )


def _same_run(event: Event, prefill: Event) -> bool:
    key = (prefill.get("run"), bool(prefill.get("warmup", False)))
    return (event.get("run"), bool(event.get("warmup", False))) == key


def _check_end(events: Sequence[Event]) -> None:
    if not events or events[-1].get("event") != "end" or events[-1].get("rc") != 0:
        raise BoaEdgeError("the run has no `end` event, so its output does not count", fix="Run it again")


def _one(events: Sequence[Event], kind: str) -> Event | None:
    return next((event for event in events if event.get("event") == kind), None)


def _amount(event: Event | None, key: str) -> int | None:
    """A positive whole number, or None where the probe gave none. A clock or a memory probe never truly says 0."""
    value = event.get(key) if event else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _whole(event: Event, key: str) -> int:
    value = event.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BoaEdgeError(f"the runner's `{event.get('event')}` event has {key} = {value!r}")
    return value
