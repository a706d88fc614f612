"""Layer names laid out as a grid: decoder blocks across, kinds of layer down."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from runtime_tests.model import LayerError

_IN_BLOCK = re.compile(r"\.(\d+)\.(?:.*\.)?([^.]+)$")
_FAINTEST = 0.1


@dataclass(frozen=True)
class LayerGrid:
    """Positive relative errors by (row, column); `kinds` names the rows, `blocks` counts the columns."""

    kinds: tuple[str, ...]
    blocks: int
    values: dict[tuple[int, int], float]

    @property
    def least(self) -> float:
        """The smallest error."""
        return min(self.values.values())

    @property
    def largest(self) -> float:
        """The largest error."""
        return max(self.values.values())

    def strength(self, value: float) -> float:
        """How strongly to draw an error: logarithmic between the smallest and the largest, 0.1 to 1."""
        if self.largest <= self.least:
            return 0.6
        place = math.log(value / self.least) / math.log(self.largest / self.least)
        return round(_FAINTEST + (1 - _FAINTEST) * place, 3)


def grid(layers: Sequence[LayerError]) -> LayerGrid | None:
    """Arrange the layers that sit in a numbered block and have a relative error; None where there is none."""
    found: dict[tuple[str, int], float] = {}
    for layer in layers:
        match = _IN_BLOCK.search(layer.name)
        value = layer.relative_loss.number if layer.relative_loss is not None else None
        if match and value is not None and value > 0:
            found[match[2], int(match[1])] = value
    if not found:
        return None
    kinds = tuple(dict.fromkeys(kind for kind, _ in found))
    blocks = max(block for _, block in found) + 1
    return LayerGrid(kinds, blocks, {(kinds.index(kind), block): value for (kind, block), value in found.items()})
