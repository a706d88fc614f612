"""Finished blocks of a run that was stopped, so that the next one goes on where it ended."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from boa_edge.errors import BoaEdgeError
from boa_edge.files import disk_errors, held, read_json, write_json
from boa_edge.progress import say
from toolchain.packing import pack, unpack
from toolchain.quantized import QuantizedWeight

FinishedBlock = tuple[dict[str, QuantizedWeight], dict[str, dict[str, Any]]]


class ResumeFile:
    """A directory beside the output that holds one file per finished block.

    Attributes:
        spent: seconds that earlier processes have worked, each up to its last finished block.

    It is bound to everything that decides the codes by a fingerprint; another run's blocks are never used.

    Raises:
        BoaEdgeError: blocks of a different run are there; the message names what differs.
    """

    def __init__(self, output: Path, method: str, identity: dict[str, Any]) -> None:
        self.spent, self._start = 0.0, time.monotonic()
        self.directory = output.absolute().with_name(f".{output.name}.{method}.unfinished")
        self._identity = {key: _digest(value) for key, value in identity.items()}
        self._times = self.directory / "seconds.json"
        known = self.directory / "identity.json"
        if known.exists():
            found = read_json(known, "the identity of an unfinished run")
            differing = [key for key in self._identity if found.get(key) != self._identity[key]]
            count = len(list(self.directory.glob("block-*.safetensors")))
            if differing and not count:
                self.discard()
            elif differing:
                fix = f"Delete {self.directory} to start over, or choose another -o"
                problem = f"an unfinished run differs from this one in: {', '.join(differing)}"
                raise BoaEdgeError(problem, where=self.directory, fix=fix)
            else:
                say(f"resuming {method}: {count} blocks are finished")
                self.spent = float(read_json(self._times, "the time of an unfinished run")) if count else 0.0
                return
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(known, self._identity)

    def _path(self, index: int) -> Path:
        return self.directory / f"block-{index:04d}.safetensors"

    def load(self, index: int) -> FinishedBlock | None:
        """Block `index`, if it was finished."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
            report = json.loads(path.with_suffix(".json").read_text())
        except (SafetensorError, OSError, ValueError):
            return None  # a block that cannot be read was never finished
        weights = {}
        for name in dict.fromkeys(name.partition(":")[0] for name in report):
            parts = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
            weights[name] = unpack(parts, *_format(report, name))
        return weights, report

    def weight(self, index: int, name: str) -> QuantizedWeight:
        """One module's codes from block `index`, which is finished."""
        path = self._path(index)
        report = json.loads(path.with_suffix(".json").read_text())
        with safe_open(path, framework="pt") as stream:
            names = [key for key in stream.keys() if key.startswith(f"{name}/")]  # noqa: SIM118 (not a mapping)
            parts = {key.rpartition("/")[2]: stream.get_tensor(key) for key in names}
            return unpack(parts, *_format(report, name))

    def save(self, index: int, weights: dict[str, QuantizedWeight], report: dict[str, dict[str, Any]]) -> None:
        """Keep block `index`."""
        path = self._path(index)
        tensors = {}
        for name, weight in weights.items():
            for part, tensor in pack(weight, torch.float32).items():
                tensors[f"{name}/{part}"] = tensor
        temporary = path.with_suffix(f".partial-{os.getpid()}")
        with disk_errors(path):
            write_json(path.with_suffix(".json"), report)
            save_file(tensors, temporary)
            write_json(self._times, self.spent + time.monotonic() - self._start)
            temporary.replace(path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the run is this process's alone, and its time counts. BoaEdgeError where another one works on it."""
        with held(self.directory) as is_held:
            if is_held is False:
                fix = "Wait for it, or choose another -o"
                raise BoaEdgeError("another process works on the same output", where=self.directory, fix=fix)
            yield

    def begin(self) -> None:
        """The work on its blocks begins now."""
        self._start = time.monotonic()

    def discard(self) -> None:
        """The run is finished: its blocks are not needed any more."""
        shutil.rmtree(self.directory, ignore_errors=True)


class FinishedWeights(Mapping[str, QuantizedWeight]):
    """Codes by module name: those of finished blocks are read when they are asked for, others kept in memory."""

    def __init__(self, resume: ResumeFile) -> None:
        self._resume = resume
        self._blocks: dict[str, int] = {}
        self._others: dict[str, QuantizedWeight] = {}

    def finish(self, index: int, names: Iterable[str]) -> None:
        """Block `index`, which holds these modules, is finished."""
        self._blocks |= dict.fromkeys(names, index)

    def add(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """Weights that are in no block."""
        self._others |= weights

    def __getitem__(self, name: str) -> QuantizedWeight:
        if name in self._blocks:
            return self._resume.weight(self._blocks[name], name)
        return self._others[name]

    def __contains__(self, name: object) -> bool:
        return name in self._blocks or name in self._others

    def __iter__(self) -> Iterator[str]:
        return iter((*self._blocks, *self._others))

    def __len__(self) -> int:
        return len(self._blocks) + len(self._others)


def _format(report: Mapping[str, dict[str, Any]], module: str) -> tuple[int, int | None]:
    """Bits and group size of a module, from the report on it or on the first of the projections that share it."""
    layer = next(layer for name, layer in report.items() if name.partition(":")[0] == module)
    return layer["bits"], layer["group_size"]


def _digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
