"""A device that is none: its tensors are the processor's, but no operation takes them together with others.

So a test on any machine finds what would be left behind on the processor, or fetched from a GPU by the wrong call. It
stands in PyTorch's slot for backends of others, whose operations may be written in Python.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME)
_CPU = torch.device("cpu")

_aten = torch.ops.aten
_COPIES = (_aten._to_copy, _aten.to, _aten.copy_, _aten._has_compatible_shallow_copy_type)
# A GPU takes indices from the processor's memory too.
_INDEXING = (_aten.index, _aten.index_put_, _aten._index_put_impl_)
_SDPA_BY_PRODUCTS = 0


class There(Tensor):
    """A tensor on the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=NAME,
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a tensor on {NAME} has no array: copy it to the processor first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Inside, tensors can be made on the device and brought to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Seen:
    """What an operation is given, brought to the processor."""

    def __init__(self) -> None:
        self.there: list[There] = []
        self.here: list[Tensor] = []
        self.devices: list[torch.device] = []

    def taken(self, value: Any) -> Any:
        if isinstance(value, There):
            self.there.append(value)
            return value.held
        if isinstance(value, Tensor):
            self.here.append(value)
        elif isinstance(value, torch.device):
            self.devices.append(value)
            return _CPU
        elif isinstance(value, list | tuple):
            return [self.taken(each) for each in value]
        return value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    seen = _Seen()
    brought = seen.taken(args)
    named = {name: seen.taken(value) for name, value in kwargs.items()}
    _check(func, seen)
    if func is _aten._fused_sdp_choice.default and seen.there:
        return _SDPA_BY_PRODUCTS
    result_is_there = seen.devices[0].type == NAME if seen.devices else bool(seen.there)
    if func is _aten.copy_.default:
        result_is_there = isinstance(args[0], There)
    if func is _aten.to.other:
        result_is_there = isinstance(args[1], There)
    result = func(*brought, **named)
    for tensor in seen.there:
        if result is tensor.held:  # changed in place, and so the same tensor as before; or copied away
            return tensor if result_is_there else result.clone()
    if not result_is_there:
        return result
    return There(result) if isinstance(result, Tensor) else tree_map_only(Tensor, There, result)


def _check(func: Any, seen: _Seen) -> None:
    if not seen.there or not seen.here:
        return
    packet = func.overloadpacket
    here = [tensor for tensor in seen.here if tensor.ndim > 0]
    if not here or packet in _COPIES:
        return
    if packet in _INDEXING and all(tensor.dtype in (torch.int64, torch.bool) for tensor in here):
        return
    raise RuntimeError(f"{func}: tensors of the processor and of {NAME} together")
