"""Checkpoints of boa-edge in optimum-executorch: the task names one, the recipe has `boa-edge export` lower it.

The two projects pin different versions of `transformers`, so boa-edge stays in its own environment and runs as a
program: the one that BOA_EDGE_COMMAND names, or else `boa-edge` on PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

COMMAND = "BOA_EDGE_COMMAND"

_LENGTH = 2048  # as in optimum-executorch
_PROGRAM = "model.pte"
# What optimum-executorch would change and a checkpoint has decided, with the values that change nothing.
_DECIDED: dict[str, tuple[Any, ...]] = {
    "qlinear": (),
    "qlinear_group_size": (),
    "qlinear_packing_format": (),
    "qembedding": (),
    "qembedding_group_size": (),
    "dtype": ("float32",),
    "device": ("cpu",),
}


def is_checkpoint(path: Path) -> bool:
    """Whether `boa-edge quantize` wrote this directory."""
    return all((path / name).is_file() for name in ("config.json", "recipe.yaml", "provenance.json"))


class Checkpoint:
    """What the task hands to the recipe: a checkpoint that nobody has loaded.

    To every other recipe it is what `load` returns, as if this package were not installed.

    Attributes:
        path: the directory.
        options: the task's keyword arguments.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], load: Callable[[], Any]) -> None:
        self.path, self.options = path, dict(options)
        self._load, self._loaded = load, None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._loaded is None:
            self._loaded = self._load()
        return getattr(self._loaded, name)


class Program:
    """A finished `.pte`, as ExecuTorch's program managers are written to files."""

    def __init__(self, directory: TemporaryDirectory[str], path: Path) -> None:
        self._directory, self._path = directory, path  # the directory lives as long as this

    @property
    def buffer(self) -> bytes:
        """The whole file."""
        return self._path.read_bytes()

    def write_to_file(self, file: BinaryIO) -> None:
        """Copy it to an open file."""
        with self._path.open("rb") as source:
            shutil.copyfileobj(source, file)

    def write_tensor_data_to_file(self, directory: object) -> None:
        """Nothing: all weights are inside."""


def lower(model: Any, command: str | None = None) -> Program:
    """The checkpoint's program, codes and scales as they are.

    Args:
        model: what the task returned.
        command: the `boa-edge` to run; None: see above.

    Raises:
        ValueError: `model` is no checkpoint of boa-edge, or an option asks for another quantization.
        FileNotFoundError: there is no such program.
        RuntimeError: it failed, with its own words.
    """
    if not isinstance(model, Checkpoint):
        raise ValueError("the recipe boa-edge lowers checkpoints that `boa-edge quantize` wrote, for text generation")
    length = _length(model)
    options = model.options
    wrong = [name for name, same in _DECIDED.items() if options.get(name) not in (None, *same)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: {model.path} is quantized already; leave this out")
    prefill = 1 if options.get("disable_dynamic_shapes") else length
    directory = TemporaryDirectory(prefix="boa-edge-")
    bundle = Path(directory.name) / "bundle"
    words = [_program(command), "export", str(model.path), "--runtime", "executorch", "-o", str(bundle)]
    # One length for both: optimum-executorch generates until get_max_seq_len, which is what one call takes.
    words += ["--context", str(length), "--prefill", str(prefill)]
    _run(words)
    return Program(directory, bundle / _PROGRAM)


def _run(words: list[str]) -> None:
    """Run a program, what it says passed on."""
    said = "it said nothing"
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            said = line.strip() or said
    if process.returncode:
        raise RuntimeError(f"`{' '.join(words)}` ended with {process.returncode}: {said}")


def _length(model: Checkpoint) -> int:
    asked = model.options.get("max_seq_len")
    if asked is not None:
        return int(asked)
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    return min(_LENGTH, int(config.get("max_position_embeddings") or _LENGTH))


def _program(command: str | None) -> str:
    wanted = command or os.environ.get(COMMAND) or "boa-edge"
    found = shutil.which(wanted)
    if found is None:
        raise FileNotFoundError(
            f"no program {wanted!r}: set {COMMAND} to the `boa-edge` of the environment that boa-edge is installed in"
        )
    return found
