"""A `.pte` of optimum-executorch, `forward(tokens, positions of all of them) -> logits of all of them`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.runtimes.drive_executorch import ExecutorchEngine
from benchmarks.runtimes.process import main


class OptimumEngine(ExecutorchEngine):
    """The same loop, with its inputs and outputs."""

    def _step(self, tokens: list[int], position: int) -> NDArray[np.float32]:
        places = torch.arange(position, position + len(tokens), dtype=torch.int64)
        output = self._method.execute((torch.tensor([tokens], dtype=torch.int64), places))[0]
        found: NDArray[np.float32] = output[0, -1].numpy()
        return found


if __name__ == "__main__":
    main(OptimumEngine)
