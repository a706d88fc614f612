"""Work shared between the processes that `torchrun` starts. Without it there is one rank, and all this does nothing.

Each rank takes its share of the calibration text and of each projection's heads or rows; sums are added up, codes
exchanged. Tensors on the CPU travel by gloo, those on GPUs by NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from boa_edge.errors import BoaEdgeError
from boa_edge.ranks import LAUNCH, launched_rank, whole_number

T = TypeVar("T")

# A rank may wait for hours while the first one writes text; a rank that has died is noticed by torchrun.
_PATIENCE = timedelta(days=7)
_store: dist.Store | None = None


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the ranks that `torchrun` has started work together."""
    global _store
    if launched_rank() is None or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(whole_number("LOCAL_RANK", 0))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    try:
        _store, own, count = next(iter(rendezvous("env://", timeout=_PATIENCE)))
        shared = dist.PrefixStore("collectives", _store)
        dist.init_process_group(backend, store=shared, rank=own, world_size=count, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:  # also those of the network
        reason = " ".join(str(error).split())[:200]
        raise BoaEdgeError(
            f"the processes do not find each other ({reason})", where="RANK is set", fix=LAUNCH
        ) from None
    yield
    dist.destroy_process_group()  # not after an error: torchrun ends the others


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank is the one that reads and writes files."""
    return rank() == 0


def first_to_fail() -> bool:
    """Whether no other rank has failed before this one: its message is the one to show."""
    if _store is None:
        return True
    try:
        return dist.PrefixStore("boa-edge", _store).add("failed", 1) == 1
    except (RuntimeError, ValueError):  # the store went down with the rank that failed first
        return False


def share(size: int, turn: int = 0) -> slice:
    """This rank's part of `size` things in a row.

    Args:
        turn: moves the parts on by so many ranks, so that what cannot be divided is not always one rank's.
    """
    count = world_size()
    part = (rank() + turn) % count
    return slice(part * size // count, (part + 1) * size // count)


def add_up(*tensors: Tensor | None) -> None:
    """Sum each tensor over all ranks, in place."""
    if world_size() == 1:
        return
    for tensor in tensors:
        if tensor is not None:
            dist.all_reduce(tensor)


def total(number: float) -> float:
    """The sum of a number over all ranks, in float64."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(value)
    return float(value)


def gather(value: T) -> list[T]:
    """Every rank's `value`, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns on the first rank, on every rank; the others do not call it."""
    if world_size() == 1:
        return make()
    values: list[Any] = [make() if is_main() else None]
    dist.broadcast_object_list(values)
    return values[0]
