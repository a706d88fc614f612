"""How a program keeps the keys and values of one layer, and which of them a query sees.

Where every query sees all before it, a slot stands for a position. A layer with a window shorter than the context keeps
no more positions than a call can look at: position p stands in slot p modulo the number of slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exporters.executorch.lowerable import Lengths
from toolchain.families import AttentionSpec

# Added to the scores of keys that are not seen. Not infinite: a softmax over nothing but infinities has no value, and
# the kernels meet such stretches of the cache.
_HIDDEN = -1e9


@dataclass(frozen=True)
class Kept:
    """The cache of one layer.

    Attributes:
        slots: positions that it holds.
        window: how many positions a query sees, its own included; None for all before it.
    """

    slots: int
    window: int | None

    @classmethod
    def of(cls, attention: AttentionSpec, lengths: Lengths) -> Kept:
        """The smallest cache that the first of the most tokens of one call still finds its whole window in."""
        # torch.export takes two tokens for the fewest of a call of several, and concludes that in two slots every call
        # begins at position 0: there is a third.
        room = lengths.context if lengths.prefill == 1 else max(lengths.context, 3)
        window = attention.window
        if window is None or window >= lengths.context:
            return cls(room, None)
        needed = window + lengths.prefill - 1
        return cls(needed if needed < lengths.context else room, window)


class Sight(nn.Module):
    """positions int64 [S], one after the other -> what to add to attention scores, float32 [S, slots]."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept
        self.slots: Tensor
        self.register_buffer("slots", torch.arange(kept.slots))

    def forward(self, positions: Tensor) -> Tensor:
        held, window = self.slots, self.kept.window
        if window is not None:
            # What stands in each slot once the last of the new tokens is there; of an empty one, less than 0.
            last = positions[-1:]
            held = last - torch.remainder(last - held, self.kept.slots)
            held = torch.where(held < 0, -window, held)  # (which nobody sees)
        distance = positions[:, None] - held[None]
        seen = distance >= 0
        if window is not None:
            seen = torch.logical_and(seen, distance < window)
        return torch.where(seen, 0.0, _HIDDEN)
