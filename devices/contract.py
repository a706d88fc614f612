"""What a device is asked to do and what it answers: the contract between runners, devices and measurements.

A runner is a native program that loads a bundle and prints one JSON object per line on stdout. A run counts only when
the `end` event with `"rc": 0` has arrived as the last line. The events are listed in docs/contracts.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Execution = Literal["measured", "emulated", "estimated"]
Event = dict[str, Any]

# What runners take at most (devices/runner/arguments.h): a CPU mask of the C library has room for so many cores.
MOST_CORES = 1024
MOST_THREADS = 1024
MOST_RUNS = 1 << 24


class GaugeSample(NamedTuple):
    """What a battery's gauge said. The sign of the current differs from maker to maker."""

    seconds: float
    amperes: float
    volts: float


@dataclass(frozen=True)
class GenerateRequest:
    """Greedy generation from one prompt, batch 1.

    Attributes:
        prompt: token ids.
        new_tokens: tokens to generate; generation does not stop at an end-of-sequence token, so that every run of a
            request does the same work.
        warmup: runs before the counted ones; they are reported with `"warmup": true`.
        repeats: counted runs.
        threads: intra-op threads of the runtime.
        profile: have the runtime record the time of every operator, which slows it down.
        cores: numbers of the CPU cores to run on; empty for any.
        battery: whose gauge is read once a second meanwhile, as the device's state names it; None for none.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    warmup: int = 0
    repeats: int = 1
    threads: int = 1
    profile: bool = False
    cores: tuple[int, ...] = ()
    battery: str | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """Teacher-forced logits of one token sequence, batch 1.

    In one call where the program gives the logits of every position, else token by token.
    """

    tokens: tuple[int, ...]
    threads: int = 1
    cores: tuple[int, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        events: every line the runner printed, parsed, in order; the last is the `end` event.
        logits: float32 [tokens, vocabulary] for a ScoreRequest, else None.
        command: the command line that ran on the device.
        files: SHA-256 of the runner and of the libraries that ran, by file name.
        execution: `measured` on real hardware (the host included), `emulated` under QEMU.
        instructions: instructions that the program had executed when it sent each event, one for each of `events`;
            None where nobody counted.
        state: what the device said of its temperature, clocks and battery, under `before` and `after`; empty where it
            has no such probes.
        notes: what a reader of the figures has to know of this run.
        profile: the runtime's record of every operator, in the runtime's own format, where it was asked for.
        gauge: what the battery's gauge said, where that was asked for.
    """

    events: tuple[Event, ...]
    logits: NDArray[np.float32] | None
    command: tuple[str, ...]
    files: dict[str, str]
    execution: Execution
    instructions: tuple[int, ...] | None = None
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    profile: bytes | None = None
    gauge: tuple[GaugeSample, ...] = ()


@dataclass(frozen=True)
class DeviceStatus:
    """One row of `boa-edge devices`. `execution` is None where only the device can say and it does not answer."""

    name: str
    description: str
    execution: Execution | None
    usable: bool
    missing: tuple[str, ...] = field(default=())


class Device(Protocol):
    """Where a bundle runs."""

    @property
    def name(self) -> str: ...

    @property
    def execution(self) -> Execution:
        """How its figures come about. BoaEdgeError where only the device can say and it does not answer."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the device says of itself (CPU, features, cores, operating system): JSON-ready."""
        ...

    def run(
        self,
        bundle: Path,
        request: GenerateRequest | ScoreRequest,
        on_event: Callable[[Event], None] | None = None,
    ) -> RunResult:
        """Run the bundle's program. Raises BoaEdgeError where the run did not finish as the contract says."""
        ...
