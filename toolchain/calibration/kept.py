"""Batches of written text beside the output, so that an interrupted run does not write them again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from boa_edge.files import disk_errors, write_json
from boa_edge.progress import say
from toolchain.calibration.writing import Written


def kept_text(output: Path) -> Path:
    """Where the text for a checkpoint at `output` is kept until that is finished."""
    return output.absolute().with_name(f".{output.name}.self-text.unfinished")


class KeptBatches:
    """A directory with one file per finished batch, bound by a fingerprint to everything that decides the text.

    Batches of another model, seed or size are removed, not used.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        self._directory = directory
        fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        known = directory / "identity.json"
        try:
            found = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found == {"fingerprint": fingerprint}:
            say(f"resuming: {len(list(directory.glob('batch-*.safetensors')))} batches of text are written")
            return
        if directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            write_json(known, {"fingerprint": fingerprint})

    def _path(self, index: int) -> Path:
        return self._directory / f"batch-{index:04d}.safetensors"

    def load(self, index: int) -> Written | None:
        """Batch `index`, if it was finished."""
        try:
            tensors = load_file(self._path(index))
            return Written(tensors.pop("tokens"), tensors.pop("nll"), tensors)
        except (SafetensorError, OSError, KeyError):
            return None  # a batch that cannot be read was never finished

    def save(self, index: int, batch: Written) -> None:
        """Keep batch `index`."""
        path = self._path(index)
        temporary = path.with_suffix(f".partial-{os.getpid()}")
        with disk_errors(path):
            save_file({"tokens": batch.tokens, "nll": batch.nll, **batch.statistics}, temporary)
            temporary.replace(path)
