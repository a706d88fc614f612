"""Starts a quantizer in a process of its own: ours and every peer's in the same way."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.peers.table import last_error

ROOT = Path(__file__).resolve().parents[1]
# What every quantizer is started with: no network, no bars, no accelerator.
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


class QuantizerError(Exception):
    """A quantizer ended with an error; its last line."""


def run_quantizer(command: list[str], place: Path, log: Path, limit: float) -> None:
    """Run one to its end, its output in `log`. QuantizerError with its last line where it fails, or where it takes more
    than `limit` minutes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **_QUIET, "PYTHONPATH": str(ROOT)}
    # Some tools write logs where they stand.
    scratch = place.with_name(f"{place.name}.scratch")
    scratch.mkdir()
    try:
        with log.open("w", encoding="utf-8") as out:
            done = subprocess.run(
                command,
                check=False,
                cwd=scratch,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=limit * 60,
            )
    except subprocess.TimeoutExpired:
        raise QuantizerError(f"not finished after {limit:g} minutes") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if done.returncode:
        told = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        raise QuantizerError(f"failed: {last_error(told)} (exit {done.returncode}; {log.name})")
