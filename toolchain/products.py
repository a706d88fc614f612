"""Float32 matrix products at the processor's full width, where PyTorch's own way falls short of it.

PyTorch hands float32 products on x86 to MKL, which on other makers' processors keeps to 256-bit instructions whatever
they have. oneDNN, which PyTorch ships as well, uses 512 bits there: over twice the speed on an AMD EPYC (Zen 5), in
the same float32. PyTorch has no switch for oneDNN's float32 products but the one that allows it to compute them in
bfloat16. On a processor without matrix tiles (AMX) it does not, since that would be no faster; where it does, the
switch must stay off. So a small product is computed both ways, and what decides is its error, which unlike a time is
the same in every run: same machine, same codes.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_LIKE_FLOAT32 = 4.0  # times the error of PyTorch's own product; bfloat16's is 10,000 times as large
_CPUINFO = Path("/proc/cpuinfo")
_ONEDNN: Any = torch.backends.mkldnn


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside, and on the threads of this process, float32 products take the faster way where there is one."""
    if not _helps():
        yield
        return
    switch = _ONEDNN.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


@functools.cache
def _helps() -> bool:
    """Whether MKL leaves half of this processor unused, and oneDNN computes in float32."""
    if not (torch.backends.mkl.is_available() and _ONEDNN.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() in ("", "GenuineIntel"):
        return False
    return _stays_float32()


def _vendor() -> str:
    """The processor's maker as it names itself; empty where that cannot be told."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _stays_float32() -> bool:
    """Whether products under the switch have float32's error, by example."""
    switch = _ONEDNN.matmul
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = left.to(torch.float64) @ right.to(torch.float64)

    def error() -> float:
        return float(((left @ right).to(torch.float64) - exact).norm())

    plain, before = error(), switch.fp32_precision
    try:
        switch.fp32_precision = "bf16"
        return error() <= _LIKE_FLOAT32 * plain
    finally:
        switch.fp32_precision = before
