"""Rotations that stay in the running model: R3 on queries and keys, R4 before `down` (QuaRot, arXiv 2404.00456).

R3  q <- q R3, k <- k R3 after RoPE, head by head: q k^T stays. For keys that are kept in few bits.
R4  x <- x R4 before `down`, and W_down <- W_down R4: R4 R4^T = I. For activations with outliers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from boa_edge.errors import UsageError
from toolchain.families import DecoderSpec
from toolchain.transforms.base import Parameters, Transform
from toolchain.transforms.fields import Fields
from toolchain.transforms.hadamard import factors, hadamard, random_rotation
from toolchain.transforms.product import OnlineProduct, times


@dataclass(frozen=True)
class RotateQueryKey(Transform):
    """R3: a random rotation of each head of q and k after RoPE, the same in all heads and layers."""

    kind: ClassVar[str] = "r3"
    seed: int = 0

    def check(self, spec: DecoderSpec) -> None:
        factors(spec.head_dim)

    def products(self, spec: DecoderSpec) -> list[OnlineProduct]:
        matrix = random_rotation(spec.head_dim, self.seed).mT.contiguous()
        modules = [names.q.rpartition(".")[0] for names in spec.layer_names]
        return [
            OnlineProduct(self.kind, "query_key", module, spec.head_dim, (matrix,), layer)
            for layer, module in enumerate(modules)
        ]

    def document(self) -> dict[str, object]:
        return {"seed": self.seed}

    @classmethod
    def restore(cls, fields: Fields, tensors: Mapping[str, Tensor]) -> RotateQueryKey:
        return cls(fields.integer("seed"))


@dataclass(frozen=True)
class RotateDown(Transform):
    """R4: a Hadamard product of what `down` takes in; its inverse is folded into `down`.

    Attributes:
        block_size: mix only within blocks of so many neighbouring channels, which is cheaper; None: all with all.
    """

    kind: ClassVar[str] = "r4"
    block_size: int | None = None

    def check(self, spec: DecoderSpec) -> None:
        if self.block_size is not None and (self.block_size < 1 or spec.intermediate_size % self.block_size):
            problem = f"blocks of {self.block_size} do not divide the {spec.intermediate_size} channels before `down`"
            raise UsageError(problem, where=f"{self.kind}: block_size")
        factors(self.block_size or spec.intermediate_size)

    def matrices(self, spec: DecoderSpec) -> tuple[Tensor, ...]:
        """The Kronecker factors of R4 (of one block of it), float64, each orthogonal."""
        sizes = factors(self.block_size or spec.intermediate_size)
        return tuple(hadamard(size) / math.sqrt(size) for size in sizes)

    def block(self, spec: DecoderSpec, layer: int, parameters: Parameters) -> dict[str, Tensor]:
        name = f"{spec.layer_names[layer].down}.weight"
        return {**parameters, name: times(parameters[name], self.matrices(spec))}

    def products(self, spec: DecoderSpec) -> list[OnlineProduct]:
        matrices = self.matrices(spec)
        return [
            OnlineProduct(self.kind, "input", names.down, spec.intermediate_size, matrices, layer)
            for layer, names in enumerate(spec.layer_names)
        ]

    def document(self) -> dict[str, object]:
        return {"block_size": self.block_size}

    @classmethod
    def restore(cls, fields: Fields, tensors: Mapping[str, Tensor]) -> RotateDown:
        return cls(fields.optional_integer("block_size"))
