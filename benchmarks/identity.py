"""What decides a result, as short hashes: finished work is kept by them. And the version that a reader is told."""

from __future__ import annotations

import hashlib
import json
import subprocess
from typing import Any

from torch import Tensor

from benchmarks.quantizer import ROOT

_SCRIPTS = ("benchmarks/ours.py", "benchmarks/peers/harness.py")


def document_hash(document: Any) -> str:
    """Of what JSON holds."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def tensor_hash(tensor: Tensor) -> str:
    """Of a tensor's shape and values."""
    return hashlib.sha256(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()).hexdigest()[:12]


def own_source() -> str:
    """Of the sources that decide what this project's methods make."""
    digest = hashlib.sha256()
    for file in [*sorted((ROOT / "toolchain").rglob("*.py")), *(ROOT / name for name in _SCRIPTS)]:
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def own_version() -> str:
    """The commit, `-dirty` where the tree has changes."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return f"boa-edge {done.stdout.strip()}" if done.returncode == 0 else "unknown"
