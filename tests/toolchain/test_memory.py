"""Free memory between tensors that stay is given back."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from toolchain.memory import give_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps it; other C libraries do not")
def test_what_lies_between_tensors_that_stay_goes_back() -> None:
    size = 1 << 15  # of so few bytes that they come from the heap, whatever was asked for before
    tensors = [torch.ones(size // 4) for _ in range(8192)]
    kept = tensors[::2]
    del tensors
    before = psutil.Process().memory_info().rss
    give_back()
    assert before - psutil.Process().memory_info().rss > 64 << 20
    assert all(bool((each == 1).all()) for each in kept)
