"""Where blocks are worked on: the processor, or a GPU.

A block's weights, the text in front of it, its statistics and its solvers are on the accelerator while the block is
worked on; all else stays where it was: the model's other blocks, its tables, transforms, the scoring at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from boa_edge.errors import UsageError

CPU = torch.device("cpu")
_KINDS = ("cuda", "xpu")  # ROCm goes by the name of cuda


def find_accelerator(name: str | None) -> torch.device:
    """The device by the name that PyTorch has for it: `cpu` (also when None), `cuda`, `cuda:1`, `xpu`.

    Raises:
        UsageError: there is no such kind, or none of it on this machine.
    """
    where = "--accelerator"
    accepted = f"Accepted: cpu, {', '.join(_KINDS)}, or one of several, such as cuda:1"
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        raise UsageError(f"no accelerator {name!r}", where=where, fix=accepted) from None
    if device.type == "cpu":
        return CPU
    if device.type not in _KINDS:
        # Apple's has no float64, which Hessians are factorized in.
        raise UsageError(f"{name!r} is not served", where=where, fix=accepted)
    module: Any = torch.get_device_module(device.type)
    found = module.device_count() if module.is_available() else 0
    if (device.index or 0) >= found:
        problem = f"PyTorch {torch.__version__} sees {found} devices of the kind {device.type} here"
        fix = "Install a build of PyTorch for it and its driver, or leave --accelerator out"
        raise UsageError(f"{problem}, {name} is none of them", where=where, fix=fix)
    return device


def at(place: torch.device, structure: Any) -> Any:
    """Tensors in any nesting, on a device; those that are there already are the same."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(place), structure)


@contextmanager
def moved(module: nn.Module, place: torch.device) -> Iterator[None]:
    """Inside, a module computes with copies of its parameters and buffers on a device; its own stay as they are."""
    if place == CPU:
        yield
        return
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for part in module.modules():
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for table in tables:
                for name, value in table.items():
                    if value is not None:
                        before.append((table, name, value))
                        copy = value.detach().to(place)
                        is_parameter = isinstance(value, nn.Parameter)
                        table[name] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
        yield
    finally:
        for table, name, value in before:
            table[name] = value
