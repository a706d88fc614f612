"""What every driver shares: its command line, the runs, and the two files it leaves.

    python -m benchmarks.runtimes.drive_NAME --model PATH --tokens FILE.npy --out DIR [--score] ...

A driver runs one program with one runtime, in an environment of its own: nothing of this project but this package, no
library but numpy.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

SUMMARY, LOGITS = "summary.json", "logits.npy"


class Engine(Protocol):
    """A loaded program."""

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        ...

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[int, int, int]:
        """Greedy: nanoseconds until the first new token, of the others together, and how many there are in all."""
        ...

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Teacher-forced [n, vocabulary], up to a constant per row."""
        ...


def main(open_engine: Callable[[Path, int], Engine]) -> None:
    """Run a driver by the command line. `open_engine` takes the program's path and a number of threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="int64 [n] prompt, or [rows, n] with --score")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--score", action="store_true", help="write logits instead of taking times")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    tokens = np.load(given.tokens)
    start = time.monotonic_ns()
    engine = open_engine(given.model, given.threads)
    load_ns = time.monotonic_ns() - start
    runs = []
    if given.score:
        _score(engine, tokens, given.out / LOGITS)
    else:
        for turn in range(given.warmup + given.repeats):
            prefill_ns, decode_ns, made = engine.generate([int(token) for token in tokens], given.new_tokens)
            if made != given.new_tokens:
                raise RuntimeError(f"it generated {made} tokens instead of {given.new_tokens}")
            if turn >= given.warmup:
                runs.append({"prefill_ns": prefill_ns, "decode_ns": decode_ns})
    summary = {"load_ns": load_ns, "runs": runs, "peak_bytes": peak_bytes(), "notes": engine.notes}
    (given.out / SUMMARY).write_text(json.dumps(summary) + "\n", encoding="utf-8")


def _score(engine: Engine, rows: NDArray[np.int64], path: Path) -> None:
    found = None
    for index, row in enumerate(rows):
        logits = engine.logits([int(token) for token in row])
        if found is None:
            shape = (*rows.shape, logits.shape[1])
            found = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        found[index] = logits


def peak_bytes() -> int:
    """The largest resident size of this process."""
    # getrusage would count the process that started this one: Linux carries its size over the start.
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * (kilobytes[0] if kilobytes else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
