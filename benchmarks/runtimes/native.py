"""A bundle by this project's native runner, on this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.runtimes.figures import Speed, Timed, speed_of
from boa_edge.errors import BoaEdgeError
from boa_edge.files import sha256_file
from devices import GenerateRequest, ScoreRequest, open_device
from devices.bundle import read_program
from devices.device import RunnerDevice


def native_speed(bundle: Path, prompt: tuple[int, ...], new_tokens: int, threads: int, repeats: int) -> Speed:
    """One process: a generation that is not timed, then `repeats` that are. Raises what the device raises."""
    request = GenerateRequest(prompt, new_tokens, warmup=1, repeats=repeats, threads=threads)
    events = [event for event in open_device("host").run(bundle, request).events if not event.get("warmup")]
    prefills = {event["run"]: event["ns"] for event in events if event["event"] == "prefill"}
    decodes = dict.fromkeys(prefills, 0)
    for event in events:
        if event["event"] == "token" and event["i"] > 0:  # the first came with the prefill
            decodes[event["run"]] += event["ns"]
    runs = [Timed(prefills[run], decodes[run]) for run in prefills]
    load = next(event["ns"] for event in events if event["event"] == "load")
    peak = next(event["peak_rss_bytes"] for event in events if event["event"] == "memory")
    return speed_of(runs, len(prompt), new_tokens, load, peak)


def native_logits(bundle: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """int64 [n] -> float32 [n, vocabulary], teacher-forced."""
    logits = open_device("host").run(bundle, ScoreRequest(tuple(int(token) for token in tokens))).logits
    if logits is None:
        raise BoaEdgeError("the runner gave no logits", where=bundle)
    return logits


def native_identity(bundle: Path) -> dict[str, str]:
    """SHA-256 of the runner and its libraries, by name."""
    device = open_device("host")
    assert isinstance(device, RunnerDevice)
    _, files = device.runner_files(read_program(bundle).runtime)
    return {name: sha256_file(path) for name, path in files.items()}
