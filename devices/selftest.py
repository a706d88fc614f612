"""What works on a device: files there and back, a program and its exit code, clock, probes, a tiny model."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from boa_edge.errors import BoaEdgeError
from devices import binaries
from devices.contract import Execution, GenerateRequest, RunResult, ScoreRequest
from devices.device import RunnerDevice
from devices.registry import open_device
from devices.tiny_decoder import VOCABULARY, write_bundle

_FILE_BYTES = 1 << 20
_PROMPT = (5, 17, 3, 88, 41)
_NEW_TOKENS = 16
# Float32 in another order of summation; the logits are of the order of 1.
_TOLERANCE = 1e-3
_RUN_S = 120.0
_WHY_NOT = ("unavailable", "denied")


@dataclass(frozen=True)
class Step:
    """One thing that was tried.

    Attributes:
        name: what.
        works: whether it does; None where it was not tried because something before it failed.
        detail: what was seen, or what is wrong.
        seconds: how long it took, as seen from here.
    """

    name: str
    works: bool | None
    detail: str
    seconds: float


@dataclass(frozen=True)
class SelfTest:
    """The result; `works` if every step does. `execution` is None where the device was not reached."""

    device: str
    execution: Execution | None
    steps: tuple[Step, ...]
    fingerprint: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def works(self) -> bool:
        return all(step.works for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "works": self.works}


def self_test(device: RunnerDevice) -> SelfTest:
    """Try everything that a measurement needs. Failures are in the result; nothing of the device's is raised."""
    test = _Test(device)
    steps: list[Step] = []
    for name, attempt in test.steps():
        if steps and steps[0].works is False:
            steps.append(Step(name, None, "not tried", 0.0))
            continue
        started = time.monotonic()
        try:
            detail, works = attempt(), True
        except BoaEdgeError as error:
            detail, works = str(error), False
        steps.append(Step(name, works, detail, round(time.monotonic() - started, 3)))
    reached = steps[0].works is True
    return SelfTest(
        device=device.name,
        execution=test.execution,
        steps=tuple(steps),
        fingerprint=test.fingerprint,
        notes=device.transport.notes() if reached else (),
    )


class _Test:
    def __init__(self, device: RunnerDevice) -> None:
        self._device = device
        self.execution = device.transport.known_execution
        self.fingerprint: dict[str, Any] = {}
        self._generated: RunResult | None = None

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("reach", self._reach),
            ("files", self._files),
            ("program", self._program),
            ("model", self._model),
            ("clock", self._clock),
            ("memory", self._memory),
            ("probes", self._probes),
        ]

    def _reach(self) -> str:
        self._device.require_usable("onnx")
        self.execution = self._device.execution
        self.fingerprint = self._device.fingerprint()
        names = ("manufacturer", "model", "board", "cpu", "machine")
        known = [str(self.fingerprint[name]) for name in names if self.fingerprint.get(name) not in (None, *_WHY_NOT)]
        return ", ".join(known) or "answers"

    def _files(self) -> str:
        content = secrets.token_bytes(_FILE_BYTES)
        with self._device.transport.open() as workplace:
            workplace.write(content, "file")
            workplace.deploy()
            back = workplace.pull("file")
            if not back.is_file() or back.read_bytes() != content:
                raise BoaEdgeError("a file did not come back as it was pushed", where=f"device {self._device.name}")
        return f"{_FILE_BYTES >> 20} MiB there and back, the same bytes"

    def _program(self) -> str:
        """Runners without arguments must say so in one event and exit with 1."""
        # One of the user's own is for every runtime.
        started = dict.fromkeys(self._start(runtime) for runtime in binaries.RUNNERS)
        return f"{' and '.join(started)}: output and exit code arrive"

    def _start(self, runtime: str) -> str:
        self._device.require_usable(runtime)
        executable, files = self._device.runner_files(runtime)
        lines: list[str] = []

        def listen(line: str) -> bool:
            lines.append(line)
            return len(lines) > 1

        with self._device.transport.open() as workplace:
            for name, source in files.items():
                workplace.push(source, name, executable=True)
            outcome = workplace.run(executable, [], listen, _RUN_S)
        said = f"{outcome.describe()}; it printed {' '.join(lines)[:200]!r}"
        if outcome.stderr:
            said += f" and said {outcome.stderr[-1][:200]!r}"
        try:
            event = json.loads(lines[0]) if len(lines) == 1 else None
        except (ValueError, RecursionError):
            event = None
        if outcome.code != 1 or not isinstance(event, dict) or event.get("event") != "error":
            raise BoaEdgeError(
                f"{executable} without arguments must print one error event and exit with 1, but {said}",
                where=f"device {self._device.name}",
            )
        return executable

    def _model(self) -> str:
        score = ScoreRequest(_PROMPT)
        with tempfile.TemporaryDirectory(prefix="boa-edge-") as directory:
            bundle = write_bundle(Path(directory) / "tiny")
            self._generated = self._device.run(bundle, GenerateRequest(_PROMPT, _NEW_TOKENS))
            scored = self._device.run(bundle, score)
            host = open_device("host")
            if not host.status().usable:
                return "runs; not compared, because this machine's own runner is not set up"
            wanted = host.run(bundle, score).logits
            tokens = _tokens(host.run(bundle, GenerateRequest(_PROMPT, _NEW_TOKENS)))
        assert wanted is not None
        assert scored.logits is not None
        worst = float(np.abs(wanted - scored.logits).max())
        if worst > _TOLERANCE or _tokens(self._generated) != tokens:
            raise BoaEdgeError(
                f"the tiny model computes something else than here: logits differ by up to {worst:.3g}, "
                f"tokens {_tokens(self._generated)} instead of {tokens}",
                where=f"device {self._device.name}",
            )
        return f"{_NEW_TOKENS} tokens as on this machine; {len(_PROMPT)} x {VOCABULARY} logits within {worst:.1e}"

    def _clock(self) -> str:
        """The runner's clock must run; that it does not run fast is checked at every run."""
        times = [event["ns"] for event in self._run_events() if event["event"] in ("load", "prefill", "token")]
        if not all(ns > 0 for ns in times):
            raise BoaEdgeError("its monotonic clock stands still", where=f"device {self._device.name}")
        skew = self.fingerprint.get("clock_skew_s")
        wall = (
            f"; its wall clock is {abs(skew)} s {'ahead' if skew > 0 else 'behind'}"
            if isinstance(skew, int) and skew
            else ""
        )
        return f"the runner's clock runs{wall}"

    def _memory(self) -> str:
        event = next(event for event in self._run_events() if event["event"] == "memory")
        peak = event["peak_rss_bytes"]
        return "peak memory is unavailable" if peak is None else f"peak of the tiny model: {peak / 1e6:.1f} MB"

    def _probes(self) -> str:
        with self._device.transport.open() as workplace:
            found = {**self.fingerprint, **workplace.state()}
        missing = [f"{name} {value}" for name, value in found.items() if value in _WHY_NOT]
        return f"{len(found) - len(missing)} answer" + (f"; {', '.join(missing)}" if missing else "")

    def _run_events(self) -> tuple[dict[str, Any], ...]:
        if self._generated is None:
            raise BoaEdgeError("no model has run", where=f"device {self._device.name}")
        return self._generated.events


def _tokens(result: RunResult) -> list[int]:
    return [event["id"] for event in result.events if event["event"] == "token"]
