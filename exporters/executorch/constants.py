"""The constants of XNNPACK delegates, by name: what the program stores once and the runtime packs for its kernels."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput

_ALIGNMENT = 16


class Constants:
    """Named bytes of a whole program.

    A name is a hash of everything that goes into a packed weight but the bias, never of the codes alone: the runtime
    keeps packed weights under the names of codes and bias. ExecuTorch 1.5.1's own lowering names codes by the codes,
    and of two linears with equal codes and different scales the second computes with those of the first (measured).

    Attributes:
        size: bytes of all of them.
    """

    def __init__(self) -> None:
        self._store = NamedDataStore()
        self.size = 0

    def add(self, kind: str, data: np.ndarray, *also: np.ndarray) -> str:
        """Store the bytes of `data`, under a name made of them and of `also`; bytes that are there stay once."""
        digest = hashlib.sha256()
        arrays = [np.ascontiguousarray(each) for each in (data, *also)]
        for array in arrays:
            digest.update(f"{array.dtype.str}{array.shape};".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        name = f"{kind}_{digest.hexdigest()}"
        if name not in self._store.pte_data:
            before = len(self._store.buffers)
            self._store.add_named_data(name, arrays[0].tobytes(), _ALIGNMENT)
            self.size += sum(len(buffer) for buffer in self._store.buffers[before:])
        return name

    def output(self) -> NamedDataStoreOutput:
        """All of it, as ExecuTorch's emitter takes it."""
        return self._store.get_named_data_store_output()


def pack_int4(codes: torch.Tensor) -> np.ndarray:
    """Signed codes as XNNPACK stores them: code + 8, even columns in the low half of a byte.

    Args:
        codes: int8 [rows, columns], within [-8, 7]; columns even.

    Returns:
        uint8 [rows, columns / 2].
    """
    unsigned = (codes.numpy() + np.int8(8)).view(np.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4))


def bfloat16_bits(scales: torch.Tensor) -> np.ndarray:
    """float32 that bfloat16 holds exactly -> its bits, uint16 of the same shape. Raises ValueError for others."""
    narrow = scales.to(torch.bfloat16)
    if not torch.equal(narrow.to(torch.float32), scales):
        raise ValueError("a scale is not representable in bfloat16")
    return narrow.view(torch.uint16).numpy()
