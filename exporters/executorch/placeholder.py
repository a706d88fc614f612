"""An operator that stands for a delegate while torch.export traces the program around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PLACEHOLDER = "boa_edge::xnnpack"

_library = torch.library.Library("boa_edge", "DEF")
_library.define("xnnpack(Tensor[] inputs, int segment, int[] heads, int[] widths) -> Tensor[]")


@torch.library.register_fake(PLACEHOLDER, lib=_library)
def _shapes(inputs: Sequence[Tensor], segment: int, heads: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
    x = inputs[0]
    return [
        x.new_empty((1, x.shape[1], count, width) if count else (1, x.shape[1], width))
        for count, width in zip(heads, widths, strict=True)
    ]


def placeholder(inputs: Sequence[Tensor], segment: int, heads: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
    """What delegate number `segment` will hand out: float32 [1, S, heads, width] each, [1, S, width] where heads is 0.

    S is the second size of the first input. It has no implementation: a module with it can be exported, not run.
    """
    outputs: list[Tensor] = torch.ops.boa_edge.xnnpack(list(inputs), segment, list(heads), list(widths))
    return outputs
