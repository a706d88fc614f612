"""A device that runs bundles: pushes what is needed, runs the native runner, and checks everything it says."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from boa_edge.errors import BoaEdgeError, UsageError
from boa_edge.files import sha256_file
from boa_edge.progress import say
from boa_edge.visible import one_line
from devices import binaries
from devices.bundle import Program, read_program
from devices.contract import (
    MOST_CORES,
    MOST_RUNS,
    MOST_THREADS,
    DeviceStatus,
    Event,
    Execution,
    GenerateRequest,
    RunResult,
    ScoreRequest,
)
from devices.cooling import wait_until_cool
from devices.events import EventStream
from devices.own_runner import own_files
from devices.process import Outcome
from devices.profile import Profile
from devices.transport import ConnectionLostError, Transport, Workplace

Result = TypeVar("Result")

_TOKENS = "tokens.bin"
_LOGITS = "logits.bin"
_PROFILE = "profile.bin"
_SILENCE_VARIABLE = "BOA_EDGE_SILENCE_LIMIT"
_ATTEMPTS = 3
# A runner cannot have worked for longer than it took as seen from here; clocks are read a little apart.
_CLOCK_TOLERANCE = 1.02
_CLOCK_SLACK_S = 0.05


class RunnerDevice:
    """A device reached through a transport. It is the `Device` of devices/contract.py."""

    def __init__(self, profile: Profile, transport: Transport) -> None:
        self._profile = profile
        self._transport = transport

    @property
    def name(self) -> str:
        return self._profile.name

    @property
    def transport(self) -> Transport:
        """How it is reached."""
        return self._transport

    @property
    def execution(self) -> Execution:
        return self._persist(lambda: self._transport.execution)

    def status(self) -> DeviceStatus:
        """Whether it can be used now, and what is missing if not."""
        missing = self._missing()
        problem = None if missing else self._transport.problem()
        return DeviceStatus(
            name=self.name,
            description=self._profile.description,
            execution=self._transport.known_execution,
            usable=not missing and problem is None,
            missing=(*missing, "fix: make setup") if missing else (problem,) if problem else (),
        )

    def fingerprint(self) -> dict[str, Any]:
        """What the device says of itself, JSON-ready. BoaEdgeError where it cannot be reached."""
        found = self._persist(self._transport.fingerprint)
        return {"name": self.name, "transport": self._profile.transport, **found}

    def run(
        self,
        bundle: Path,
        request: GenerateRequest | ScoreRequest,
        on_event: Callable[[Event], None] | None = None,
    ) -> RunResult:
        """Run a bundle's program.

        Args:
            bundle: a directory as `export` writes it.
            request: what to do; token ids are checked against the bundle's vocabulary and context length.
            on_event: called with each event as it arrives, already checked.

        Raises:
            UsageError: the request does not fit the model.
            BoaEdgeError: something is missing, or the run did not finish as the contract says.
        """
        program = read_program(Path(bundle))
        check_request(program, request)
        self.require_usable(program.runtime)
        executable, files = self.runner_files(program.runtime)
        return self._persist(lambda: self._run_once(program, executable, files, request, on_event))

    def _persist(self, work: Callable[[], Result]) -> Result:
        """What `work` gives, begun again where the connection was lost; the last loss is raised."""
        attempt = 1
        while True:
            try:
                return work()
            except ConnectionLostError as lost:
                if attempt == _ATTEMPTS:
                    raise
                say(f"{lost} Trying again ({attempt} of {_ATTEMPTS - 1})")
            self._transport.recover()
            attempt += 1

    def _run_once(
        self,
        program: Program,
        executable: str,
        files: dict[str, Path],
        request: GenerateRequest | ScoreRequest,
        on_event: Callable[[Event], None] | None,
    ) -> RunResult:
        with self._transport.open() as workplace:
            for name, source in files.items():
                workplace.push(source, name, executable=name in (executable, binaries.LOADER))
            for name in program.files:
                workplace.push(program.directory / name, name)
            self._push_tokens(workplace, request)
            # What it takes to get there is no time in which the runner can have worked.
            workplace.deploy()
            arguments = _arguments(program, request, workplace)
            battery = request.battery if isinstance(request, GenerateRequest) else None
            if battery is not None:
                workplace.watch(battery)
            below = self._profile.start_below_c if isinstance(request, GenerateRequest) else None
            before = wait_until_cool(workplace.state, below, self._profile.cool_down_limit_s, self.name)
            events = self._execute(workplace, executable, arguments, program, request, on_event)
            after = workplace.state()
            instructions = workplace.instructions()
            logits = self._read_logits(workplace, program, request) if isinstance(request, ScoreRequest) else None
            profile = self._read_profile(workplace) if _profiled(request) else None
            return RunResult(
                events=events,
                logits=logits,
                command=workplace.command(executable, arguments),
                files={name: sha256_file(source) for name, source in files.items()},
                execution=self._transport.execution,
                instructions=instructions if instructions and len(instructions) == len(events) else None,
                state={"before": before, "after": after} if before or after else {},
                notes=self._transport.notes(),
                profile=profile,
                gauge=() if battery is None else workplace.gauge(),
            )

    def _missing(self, runtime: str | None = None) -> tuple[str, ...]:
        """What is missing for one runtime, or for all."""
        missing = self._transport.missing()
        if self._profile.runner_path is not None:
            return missing
        return (*missing, *binaries.missing(self._transport.target, runtime))

    def require_usable(self, runtime: str) -> None:
        """BoaEdgeError where something is missing that a program of this runtime needs."""
        missing = self._missing(runtime)
        if missing:
            lacks = "; ".join(missing)
            raise BoaEdgeError(f"cannot be used: {lacks} missing", where=f"device {self.name}", fix="Run `make setup`")

    def runner_files(self, runtime: str) -> tuple[str, dict[str, Path]]:
        """The name of the program to run, and name -> local file of all that it needs besides the model."""
        own = self._profile.runner_path
        if own is not None:
            return own.name, own_files(self._profile, own)
        runner = binaries.runner_for(runtime)
        return runner.program, binaries.files_for(runner, self._transport.target)

    def _push_tokens(self, workplace: Workplace, request: GenerateRequest | ScoreRequest) -> None:
        tokens = request.tokens if isinstance(request, ScoreRequest) else request.prompt
        workplace.write(np.asarray(tokens, dtype="<i8").tobytes(), _TOKENS)

    def _execute(
        self,
        workplace: Workplace,
        executable: str,
        arguments: list[str],
        program: Program,
        request: GenerateRequest | ScoreRequest,
        on_event: Callable[[Event], None] | None,
    ) -> tuple[Event, ...]:
        # A runner of the user's own brings whatever version it was built with.
        version = binaries.runner_for(program.runtime).wheel.version() if self._profile.runner_path is None else None
        stream = EventStream(self.name, request, program.runtime, version, vocabulary=program.vocab_size)
        refused: list[BoaEdgeError] = []

        def on_line(line: str) -> bool:
            if refused:  # the first problem counts; the rest is read only to learn how the process ends
                return True
            try:
                event = stream.accept(line)
            except BoaEdgeError as error:
                refused.append(error)
                return True
            if on_event is not None:
                on_event(event)
            return False

        limit = self._silence_limit()
        started = time.monotonic()
        try:
            outcome = workplace.run(executable, arguments, on_line, limit)
        except OSError as error:
            raise BoaEdgeError(f"the runner cannot be started ({error})", where=f"device {self.name}") from error
        elapsed = time.monotonic() - started
        self._judge(stream, refused, outcome)
        self._check_clock(stream, elapsed)
        return tuple(stream.events)

    def _check_clock(self, stream: EventStream, elapsed_s: float) -> None:
        """What the runner timed happened one after the other, so its sum cannot exceed what passed here meanwhile."""
        claimed = stream.claimed_ns / 1e9
        if claimed > elapsed_s * _CLOCK_TOLERANCE + _CLOCK_SLACK_S:
            raise BoaEdgeError(
                f"the runner claims {claimed:.3g} s of work, but only {elapsed_s:.3g} s passed here meanwhile",
                where=f"device {self.name}",
                fix="The device's clock runs fast or the runner misreports its times: no figure of it can be trusted",
            )

    def _judge(self, stream: EventStream, refused: list[BoaEdgeError], outcome: Outcome) -> None:
        """A run counts only if every event was right, `end` was the last, and the process exited with 0."""
        said = f" Last words: {one_line(' | '.join(outcome.stderr[-3:])[-600:], 600)}" if outcome.stderr else ""
        if refused:
            raise BoaEdgeError(str(refused[0]) + said)
        if outcome.code != 0:
            after = (
                f"after its end event, {outcome.describe()}"
                if stream.ended
                else (f"after {len(stream.events)} events, {outcome.describe()}")
            )
            raise BoaEdgeError(
                f"the runner did not finish: {after}", where=f"device {self.name}", fix=_advice(outcome) + said
            )
        try:
            stream.finish()
        except BoaEdgeError as error:
            raise BoaEdgeError(str(error) + said) from None

    def _read_logits(self, workplace: Workplace, program: Program, request: ScoreRequest) -> NDArray[np.float32]:
        shape = (len(request.tokens), program.vocab_size)
        path = workplace.pull(_LOGITS)
        size = path.stat().st_size if path.is_file() else -1
        wanted = shape[0] * shape[1] * 4
        if size != wanted:
            found = "no logits file" if size < 0 else f"a logits file of {size} bytes"
            raise BoaEdgeError(
                f"the runner left {found}; {shape[0]} tokens x {shape[1]} entries are {wanted} bytes",
                where=f"device {self.name}",
            )
        logits: NDArray[np.float32] = np.fromfile(path, dtype="<f4").reshape(shape).astype(np.float32, copy=False)
        if not np.isfinite(logits).all():
            raise BoaEdgeError("the logits hold values that are not finite", where=f"device {self.name}")
        return logits

    def _read_profile(self, workplace: Workplace) -> bytes:
        path = workplace.pull(_PROFILE)
        content = path.read_bytes() if path.is_file() else b""
        if not content:
            raise BoaEdgeError("the runner left no operator profile", where=f"device {self.name}")
        return content

    def _silence_limit(self) -> float:
        text = os.environ.get(_SILENCE_VARIABLE)
        if text is None:
            return self._profile.silence_limit_s
        try:
            limit = float(text)
        except ValueError:
            limit = 0.0
        if not 0 < limit < float("inf"):
            raise UsageError(f"is {text!r}; it must be a number of seconds above 0", where=f"${_SILENCE_VARIABLE}")
        return limit


def _advice(outcome: Outcome) -> str:
    if outcome.advice is not None:
        return outcome.advice
    if outcome.problem is not None:
        return f"If the device is only slow, set ${_SILENCE_VARIABLE} to more seconds"
    if outcome.code == -9:
        return "Most likely the memory ran out: use a smaller model or a shorter sequence"
    if outcome.code == -4:
        return "An instruction that the CPU does not have: the profile's features and QEMU's CPU must agree"
    return "See what it said last; `make setup` rebuilds a damaged runner"


def _arguments(program: Program, request: GenerateRequest | ScoreRequest, workplace: Workplace) -> list[str]:
    arguments = ["--model", workplace.path(program.model), "--tokens", workplace.path(_TOKENS)]
    arguments += ["--form", program.form, "--threads", str(request.threads)]
    if isinstance(request, ScoreRequest):
        arguments += ["--mode", "score", "--logits", workplace.path(_LOGITS)]
    else:
        arguments += ["--mode", "generate", "--new-tokens", str(request.new_tokens)]
        arguments += ["--warmup", str(request.warmup), "--repeats", str(request.repeats)]
        if request.profile:
            arguments += ["--profile", workplace.path(_PROFILE)]
    if request.cores:
        arguments += ["--cores", ",".join(map(str, request.cores))]
    if program.prefill_length is not None:
        arguments += ["--prefill", str(program.prefill_length)]
    for key, value in program.session_config.items():
        arguments += ["--config", f"{key}={value}"]
    return arguments


def _profiled(request: GenerateRequest | ScoreRequest) -> bool:
    return isinstance(request, GenerateRequest) and request.profile


def check_request(program: Program, request: GenerateRequest | ScoreRequest) -> None:
    """UsageError where the request is empty, negative, or more than the model takes."""
    if isinstance(request, ScoreRequest):
        tokens, what, positions = request.tokens, "tokens", len(request.tokens)
        counts = {"threads": (request.threads, 1)}
    else:
        tokens, what = request.prompt, "prompt"
        positions = len(tokens) + request.new_tokens - 1  # the last token is not fed back
        counts = {
            "new_tokens": (request.new_tokens, 1),
            "warmup": (request.warmup, 0),
            "repeats": (request.repeats, 1),
            "threads": (request.threads, 1),
        }
    for name, (count, least) in counts.items():
        most = MOST_THREADS if name == "threads" else MOST_RUNS
        if count < least:
            raise UsageError(f"{name} is {count}; it must be at least {least}")
        if count > most:
            raise UsageError(f"{name} is {count}; it must be at most {most}")
    for core in request.cores:
        if not 0 <= core < MOST_CORES:
            raise UsageError(f"core {core} is no number of a CPU core; they are 0 to {MOST_CORES - 1}")
    if not tokens:
        raise UsageError(f"the {what} is empty; at least one token is needed")
    for index, token in enumerate(tokens):
        if not 0 <= token < program.vocab_size:
            raise UsageError(f"{what}[{index}] is {token}; the vocabulary has {program.vocab_size} entries")
    if positions > program.context_length:
        raise UsageError(f"{positions} positions are asked for; the model's context has {program.context_length}")
