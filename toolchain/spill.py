"""Where activations are kept between two looks: on the device that works on them, or in files mapped into memory, which
leave it when memory is short.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from boa_edge.files import disk_errors
from toolchain.accelerator import CPU


@dataclass(frozen=True)
class Spill:
    """Keeps tensors in files of a directory; without one, in the memory of a device.

    The files have no names: they are gone as soon as nobody uses them, whatever becomes of the process.
    """

    directory: Path | None = None
    place: torch.device = CPU

    def __call__(self, tensor: Tensor) -> Tensor:
        """A tensor of the same values; the tensor itself where it stays where it is."""
        if self.directory is None:
            return tensor.to(self.place)
        size = tensor.numel() * tensor.element_size()
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix="activations-", dir=self.directory) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.view(tensor.shape).copy_(tensor)
