"""A product with a fixed matrix that the running model computes, told so that an exporter can write it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor

# Of a module's output or (only) input, or of each head of the queries and keys that a module's attention compares.
Place = Literal["output", "input", "query_key"]


@dataclass(frozen=True, eq=False)
class OnlineProduct:
    """x [..., size] <- x M at a place in the model, with M = I (x) F_1 (x) ... (x) F_k.

    As plain operations: reshape to [..., size / prod, f_1, ..., f_k], for each axis a MatMul with F_i with that axis
    last, reshape back. One factor of the whole size is one MatMul.

    Attributes:
        kind: "r1", "r1_inverse", "r3", "r4", "rotate_table" or "rotate_table_inverse".
        module: full name of the module at whose place it stands.
        factors: float64 [f_i, f_i], orthogonal.
        layer: None outside the blocks.
    """

    kind: str
    place: Place
    module: str
    size: int
    factors: tuple[Tensor, ...]
    layer: int | None = None

    def __deepcopy__(self, _memo: object) -> Self:
        return self  # a value: copies of a model share it

    def __call__(self, x: Tensor) -> Tensor:
        """x M, in the dtype and on the device of x."""
        return times(x, [factor.to(x) for factor in self.factors])

    def back(self, x: Tensor) -> Tensor:
        """x M^-1."""
        return times(x, [factor.mT.to(x) for factor in self.factors])


def times(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x (I (x) F_1 (x) ... (x) F_k) for x [..., n]; the product of the factors' sizes divides n."""
    sizes = [factor.shape[0] for factor in factors]
    count = x.shape[-1]
    for size in sizes:
        count //= size
    # No -1: x may hold no tokens.
    folded = x.reshape(*x.shape[:-1], count, *sizes)
    for place, factor in enumerate(factors):
        axis = place - len(sizes)
        folded = (folded.movedim(axis, -1) @ factor).movedim(-1, axis)
    return folded.reshape(x.shape)
