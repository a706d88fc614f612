"""What every peer's script shares: its command line, the check of what it made, and the two files it writes.

Runs in the peer's own environment: nothing of this project but this package and the way that float32 products take,
the same for every method; no library but torch, safetensors and transformers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toolchain.products import fast_products

WEIGHTS_FILE, SUMMARY_FILE = "weights.safetensors", "summary.json"
BLOCKS = "model.layers."
# Two values of one row closer than this, relative to the row's largest, are one grid point reached by two roundings.
_SAME = 1e-5
# How far, in steps, a value may lie beside its grid point: more than float32 ever rounds, less than any error.
_OFF = 1e-3
# Rounding a weight to a step s costs s^2 / 12 on average; a zero point that is off by one costs s^2, twelve times that.
_WORST = 8.0


class GridError(ValueError):
    """A weight that is not on the grid it was asked for."""


@dataclass(frozen=True)
class Job:
    """One quantization: a request, as the command line says it."""

    model: Path
    tokens: Tensor
    bits: int
    group_size: int | None
    symmetric: bool
    seed: int
    variant: str
    out: Path


@dataclass
class Made:
    """What a peer made of a model.

    Attributes:
        weights: every changed parameter by name, as it takes part in the forward pass.
        on_grid: what is stored, where that is not the weight itself; its grid is checked instead.
        seconds: wall time.
        cpu_seconds: computed in that time, on all cores together.
        in_child: the work is done by a process that the script starts, whose memory counts.
        notes: what a reader of the table must know.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    on_grid: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    in_child: bool = False
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the block's wall time to `seconds`, and to the other what this process and those that it has waited for
        computed in it, on all cores.
        """
        start, computed = time.monotonic(), _computed()
        yield
        self.seconds += time.monotonic() - start
        self.cpu_seconds += _computed() - computed


def _computed() -> float:
    """Seconds of all cores, of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main(
    package: str,
    make: Callable[[Job], Made],
    variants: tuple[str, ...] = ("default",),
    words: Sequence[str] | None = None,
) -> None:
    """Run a peer's script: `make` by the command line (or `words`), checked and written."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory, safetensors, float32")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors file with int64 [n, length] `tokens`")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True, help="0: one scale per output channel")
    parser.add_argument("--symmetric", type=int, choices=(0, 1), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(words)
    random.seed(given.seed)
    torch.manual_seed(given.seed)
    job = Job(
        model=given.model,
        tokens=load_file(given.tokens)["tokens"],
        bits=given.bits,
        group_size=given.group_size or None,
        symmetric=bool(given.symmetric),
        seed=given.seed,
        variant=given.variant,
        out=given.out,
    )
    job.out.mkdir(parents=True, exist_ok=True)
    with fast_products():
        made = make(job)
    versions = {name: metadata.version(name) for name in (package, "torch", "transformers")}
    write(job, made, versions)


def write(job: Job, made: Made, versions: Mapping[str, str]) -> None:
    """Check what was made, then write its two files. GridError where it is not what was asked for."""
    check_made(job, made)
    package, version = next(iter(versions.items()))
    tensors = {name: value.detach().to(torch.float32).contiguous() for name, value in made.weights.items()}
    save_file(tensors, job.out / WEIGHTS_FILE)
    summary = {
        "seconds": round(made.seconds, 2),
        "cpu_seconds": round(made.cpu_seconds, 2),
        "peak_mb": round(peak_bytes(made.in_child) / 1e6),
        "version": f"{package} {version}",
        "versions": dict(versions),
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "machine": machine(),
        "notes": made.notes,
    }
    (job.out / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def machine() -> str:
    """What computed here: the processor's name, the widest instructions that PyTorch finds on it, and the threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"


def peak_bytes(in_child: bool = False) -> int:
    """The largest resident size of this process; with `in_child`, or of one that it has waited for."""
    # getrusage would count the process that started this one: Linux carries its size over the start.
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    own = kilobytes[0] if kilobytes else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # What a child carries over is this process's size, which counts anyway.
    return 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if in_child else 0)


def check_made(job: Job, made: Made) -> None:
    """Every block linear was quantized, nothing outside the blocks was touched, and all is on the grid."""
    original = load_parameters(job.model)
    linears = block_linears(original)
    if missing := [name for name in linears if name not in made.weights]:
        raise GridError(f"{len(missing)} block linears were not quantized, {missing[0]} the first")
    if outside := [name for name in made.weights if not name.startswith(BLOCKS)]:
        raise GridError(f"parameters outside the blocks were changed: {', '.join(outside)}")
    for name, value in made.weights.items():
        if value.shape != original[name].shape:
            raise GridError(f"{name}: shape {tuple(value.shape)} instead of {tuple(original[name].shape)}")
        if not bool(torch.isfinite(value).all()):
            raise GridError(f"{name}: not all values are finite")
    for name in linears:
        check_grid(name, made.on_grid.get(name, made.weights[name]), job.bits, job.group_size, job.symmetric)
    if set(made.weights) == set(linears):  # scales that other parameters took over are no error of these
        check_error({name: original[name] for name in linears}, made.weights, job.bits, job.group_size, job.symmetric)


def check_grid(name: str, weight: Tensor, bits: int, group_size: int | None, symmetric: bool) -> None:
    """Raise GridError where a group of a row does not lie on evenly spaced points, 2^bits at most.

    On a symmetric grid a group moreover has no more than 2^(bits-1) + 1 magnitudes.
    """
    columns = weight.shape[1]
    size = group_size or columns
    if columns % size:
        raise GridError(f"{name}: groups of {size} do not divide {columns} inputs")
    groups = weight.detach().to(torch.float64).reshape(-1, size)
    most = int(_distinct(groups).max())
    if most > 1 << bits:
        raise GridError(f"{name}: {most} values in one group, {1 << bits} are all that {bits} bits can hold")
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    astray = torch.ones(groups.shape[0], dtype=torch.bool)
    for steps in range(1, 1 << bits):  # between a group's smallest and largest value
        left = astray.nonzero()[:, 0]
        if left.numel() == 0:
            break
        step = (high[left] - low[left]).clamp(min=torch.finfo(torch.float64).tiny) / steps
        codes = (groups[left] - low[left]) / step
        astray[left] = ((codes - codes.round()).abs() > _OFF).any(-1)
    if bool(astray.any()):
        raise GridError(f"{name}: {int(astray.sum())} groups lie on no even grid of {1 << bits} points")
    if symmetric:
        most, allowed = int(_distinct(groups.abs()).max()), (1 << (bits - 1)) + 1
        if most > allowed:
            raise GridError(f"{name}: {most} magnitudes in one group, a symmetric grid has {allowed}: it is asymmetric")


def check_error(
    original: Mapping[str, Tensor], made: Mapping[str, Tensor], bits: int, group_size: int | None, symmetric: bool
) -> None:
    """Raise GridError where weights are further from the original than any rounding takes them: misread codes."""
    error = expected = 0.0
    for name, weight in original.items():
        groups = weight.to(torch.float64).reshape(weight.shape[0], -1, group_size or weight.shape[1])
        spread = 2 * groups.abs().amax(-1) if symmetric else groups.amax(-1) - groups.amin(-1)
        expected += float((spread / ((1 << bits) - 1)).square().sum()) * groups.shape[-1] / 12
        error += float((made[name] - weight).to(torch.float64).square().sum())
    if error > _WORST * expected:
        raise GridError(
            f"the weights' squared error is {error / expected:.0f} times that of rounding: they are misread"
        )


def _distinct(groups: Tensor) -> Tensor:
    """How many values each row has."""
    ordered = groups.sort(-1).values
    tolerance = _SAME * groups.abs().amax(-1, keepdim=True)
    return (ordered.diff(dim=-1) > tolerance).sum(-1) + 1


def load_parameters(model: Path) -> dict[str, Tensor]:
    """All tensors of a model directory."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def block_linears(parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the matrices inside the decoder blocks."""
    return [name for name, value in parameters.items() if name.startswith(BLOCKS) and value.ndim == 2]


def load_model(job: Job) -> nn.Module:
    """The original, float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    return model.eval()


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears inside the decoder blocks, by the name of their weight."""
    found = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if name.startswith(BLOCKS)}
