"""The peers: where each comes from, what it can be asked for, and how its environment is made.

A peer is a line in PEERS and a script beside this file. What cannot run is listed too, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from boa_edge.progress import say

HERE = Path(__file__).resolve().parent
_STAMP = "requirements.json"
_TORCH = "torch==2.13.0"  # whose CPU build pip takes wherever it sees it (docs/setup.md)


@dataclass(frozen=True)
class Format:
    """What a run is asked for. group_size None: one scale per output channel."""

    bits: int
    group_size: int | None
    symmetric: bool


@dataclass(frozen=True)
class Peer:
    """One method of one tool.

    Attributes:
        script: module in this package.
        environment: directory of its environment; peers of one tool share it. None: this project's own.
        requirements: what pip installs into it.
        refuses: why a format cannot be had, or None.
        calibrated: whether it reads the calibration tokens; if not, its runs do not differ by seed.
        note: how it was set where that was a choice.
        quantizes_activations: it stands in the tables with quantized activations, and in no other.
    """

    script: str
    variant: str
    environment: str | None
    requirements: tuple[str, ...]
    refuses: Callable[[Format], str | None]
    calibrated: bool = True
    note: str = ""
    quantizes_activations: bool = False


class EnvironmentMissingError(Exception):
    """Why a peer's environment could not be made: the last line of pip's error."""


def _anything(_: Format) -> str | None:
    return None


def _hqq(wanted: Format) -> str | None:
    return "its grids are asymmetric only" if wanted.symmetric else None


def _quanto(wanted: Format) -> str | None:
    if wanted.bits == 3:
        return "it has 2, 4 and 8 bits"
    if wanted.symmetric and wanted.bits < 8:
        return "its grids below 8 bits are asymmetric only"
    return None


def _eight_da_four_w(wanted: Format) -> str | None:
    if wanted.bits != 4 or not wanted.symmetric or wanted.group_size is None:
        return "its format is 4 bits, symmetric, in groups"
    return None


def _genai(wanted: Format) -> str | None:
    return None if wanted == Format(4, 32, True) else "its default is 4 bits in groups of 32"


_LLM_COMPRESSOR = ("llmcompressor", ("llmcompressor==0.14.0.1", "transformers==5.17.0", _TORCH))
_HQQ = ("hqq", ("hqq==0.2.8.post1", "transformers==5.23.0", _TORCH))
_QUANTO = ("quanto", ("optimum-quanto==0.2.7", "transformers==5.23.0", "accelerate==1.15.0", _TORCH))
# 7.7.0 asks for torch 2.14.1 or later, of which pip finds no CPU build here.
_GPTQ_MODEL = ("gptqmodel", ("gptqmodel==7.6.0", "transformers==5.23.0", _TORCH))
_AUTOROUND = ("autoround", ("auto-round==0.16.1", "transformers==5.23.0", _TORCH))
_TORCHAO = (None, ("torchao==0.18.0",))  # this project pins it itself
_GENAI = (
    "genai",
    ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx-ir==1.1.0", "transformers==5.23.0", _TORCH),
)

PEERS: dict[str, Peer] = {
    "llm-compressor GPTQ": Peer("llm_compressor", "gptq", *_LLM_COMPRESSOR, _anything),
    "llm-compressor AWQ": Peer("llm_compressor", "awq", *_LLM_COMPRESSOR, _anything),
    "GPTQModel GPTQ": Peer("gptq_model", "default", *_GPTQ_MODEL, _anything),
    "AutoRound": Peer("autoround", "default", *_AUTOROUND, _anything),
    "AutoRound light": Peer("autoround", "light", *_AUTOROUND, _anything),
    "HQQ": Peer("half_quadratic", "default", *_HQQ, _hqq, calibrated=False),
    "quanto": Peer("quanto", "max", *_QUANTO, _quanto, calibrated=False),
    "torchao RTN": Peer("torch_ao", "rtn", *_TORCHAO, _anything, calibrated=False),
    "torchao HQQ": Peer(
        "torch_ao",
        "hqq",
        *_TORCHAO,
        lambda wanted: None if wanted.symmetric else "its HQQ search finds scales only: symmetric grids",
        calibrated=False,
    ),
    "llm-compressor SmoothQuant + GPTQ W4A8": Peer(
        "smooth_quant", "default", *_LLM_COMPRESSOR, _anything, quantizes_activations=True
    ),
    "torchao 8da4w": Peer(
        "torch_ao_8da4w", "default", *_TORCHAO, _eight_da_four_w, calibrated=False, quantizes_activations=True
    ),
    "onnxruntime-genai builder": Peer(
        "genai_builder", "default", *_GENAI, _genai, calibrated=False, quantizes_activations=True
    ),
}

# Seen with the pinned versions on a machine without an accelerator; each with the tool's own words.
NOT_RUN: dict[str, str] = {
    "torchao GPTQ 0.18.0": (
        "needs CUDA: `GPTQ only supports CUDA currently`; its int4 base needs the CUDA library mslk: "
        "`mslk is not installed. Please install mslk to use int4 quantization.`"
    ),
    "torchao AWQ 0.18.0": (
        "no integer format that runs on a CPU takes its scales: `weight must support activation scaling through "
        "implementing SupportsActivationPreScaling`"
    ),
    "torchao int4 (tinygemm) 0.18.0": "`Requires mslk >= 1.0.0`, a CUDA library; its intx format is in the tables",
}


def python_of(peer: Peer, place: Path) -> Path:
    """The interpreter that runs a peer, its environment made where it is not there yet.

    Args:
        place: directory of all environments.

    Raises:
        EnvironmentMissingError: pip could not install it.
    """
    if peer.environment is None:
        return Path(sys.executable)
    directory = place / peer.environment
    python = directory / "bin" / "python"
    stamp = directory / _STAMP
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == list(peer.requirements):
        return python
    shutil.rmtree(directory, ignore_errors=True)
    say(f"installing {peer.requirements[0]} into {directory} (a few minutes)")
    place.mkdir(parents=True, exist_ok=True)
    # This project's pip serves every environment, so that none needs its own.
    _install([sys.executable, "-m", "venv", "--without-pip", str(directory)], place)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--disable-pip-version-check"]
    _install([*pip, "--progress-bar", "off", *peer.requirements], place)
    stamp.write_text(json.dumps(list(peer.requirements)) + "\n", encoding="utf-8")
    return python


def _install(command: list[str], place: Path) -> None:
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    log = place / "install.log"
    log.write_text(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}", encoding="utf-8")
    if done.returncode:
        raise EnvironmentMissingError(last_error(done.stderr or done.stdout))


def last_error(text: str) -> str:
    """The line of a program's output that says why it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()]
    return (told or lines or ["it said nothing"])[-1][:300]


def identity(peer: Peer) -> str:
    """What decides a peer's results, besides the request: versions and the script."""
    digest = hashlib.sha256(json.dumps([peer.requirements, peer.variant]).encode())
    for file in (HERE / f"{peer.script}.py", HERE / "harness.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
