"""A rotation of what the head takes in, and of the embedding's rows where the table is tied to it.

    x <- x Q before the head, W_head <- W_head Q      Q = I (x) H / sqrt(b), b channels of a block, random signs

A few channels of the last norm are many times larger than the rest, and int8 activations there cost more than those of
all the blocks' queries, keys and values together (docs/log.md). Within a block, Q spreads them. A tied table is the
embedding's too: what is looked up is turned back, x <- x Q^T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from toolchain.families import DecoderSpec
from toolchain.transforms.base import Parameters, Transform
from toolchain.transforms.fields import Fields
from toolchain.transforms.hadamard import random_rotation
from toolchain.transforms.product import OnlineProduct, times

_LARGEST_BLOCK = 128


@dataclass(frozen=True)
class RotateTable(Transform):
    """The same random Hadamard matrix in every block of channels, as large as a power of two up to 128 divides them.

    Attributes:
        seed: of the signs.
    """

    kind: ClassVar[str] = "rotate_table"
    seed: int = 0

    def matrix(self, spec: DecoderSpec) -> Tensor:
        """One block, float64 [b, b], orthogonal; rows are multiplied by it."""
        return random_rotation(math.gcd(spec.hidden_size, _LARGEST_BLOCK), self.seed).mT.contiguous()

    def tables(self, spec: DecoderSpec, parameters: Parameters) -> dict[str, Tensor]:
        held = dict(parameters)
        head, embedding = f"{spec.head}.weight", f"{spec.embedding}.weight"
        turned = times(held[embedding if spec.tied_embeddings else head], [self.matrix(spec)])
        for name in (embedding, head) if spec.tied_embeddings else (head,):
            if name in held:  # a tied head may have no entry of its own
                held[name] = turned
        return held

    def products(self, spec: DecoderSpec) -> list[OnlineProduct]:
        matrix, size = self.matrix(spec), spec.hidden_size
        product = OnlineProduct(self.kind, "input", spec.head, size, (matrix,))
        if not spec.tied_embeddings:
            return [product]
        back = matrix.mT.contiguous()
        return [OnlineProduct(f"{self.kind}_inverse", "output", spec.embedding, size, (back,)), product]

    def document(self) -> dict[str, object]:
        return {"seed": self.seed}

    @classmethod
    def restore(cls, fields: Fields, tensors: Mapping[str, Tensor]) -> RotateTable:
        return cls(fields.integer("seed"))
