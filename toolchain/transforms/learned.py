"""R1 and R2 as matrices of their own, for rotations that are no random Hadamard: those that were learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast, get_args

import torch
from torch import Tensor

from boa_edge.errors import BoaEdgeError
from toolchain.families import DecoderSpec
from toolchain.transforms.fields import Fields
from toolchain.transforms.rotate import HeadMode, ResidualRotation, ValueRotation

_LARGEST_DEVIATION = 1e-6


@dataclass(frozen=True, eq=False)
class LearnedResidual(ResidualRotation):
    """R1.

    Attributes:
        rotation: float64 [hidden, hidden]; rows are multiplied by it. On models with layer norms R 1 = 1.
    """

    kind: ClassVar[str] = "r1_learned"
    rotation: Tensor
    head: HeadMode = "tied"

    def check(self, spec: DecoderSpec) -> None:
        self.check_head()
        _check_orthogonal(self.rotation, (spec.hidden_size, spec.hidden_size), self.kind)
        if spec.norm == "layer" and float((self.rotation.sum(1) - 1).abs().max()) > _LARGEST_DEVIATION:
            raise BoaEdgeError("turns the vector of ones, which layer norms do not allow", where=self.kind)

    def matrix(self, spec: DecoderSpec) -> Tensor:
        return self.rotation

    def document(self) -> dict[str, object]:
        return {"head": self.head}

    def tensors(self) -> dict[str, Tensor]:
        return {"rotation": self.rotation}

    @classmethod
    def restore(cls, fields: Fields, tensors: Mapping[str, Tensor]) -> LearnedResidual:
        head = cast(HeadMode, fields.choice("head", get_args(HeadMode)))
        return cls(_held(fields, tensors, "rotation"), head)


@dataclass(frozen=True, eq=False)
class LearnedValues(ValueRotation):
    """R2.

    Attributes:
        rotations: float64 [layers, kv heads, head size, head size]; columns are multiplied by them.
    """

    kind: ClassVar[str] = "r2_learned"
    rotations: Tensor

    def check(self, spec: DecoderSpec) -> None:
        _check_orthogonal(self.rotations, (spec.layers, spec.kv_heads, spec.head_dim, spec.head_dim), self.kind)

    def matrices(self, spec: DecoderSpec, layer: int) -> Tensor:
        return self.rotations[layer]

    def document(self) -> dict[str, object]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {"rotations": self.rotations}

    @classmethod
    def restore(cls, fields: Fields, tensors: Mapping[str, Tensor]) -> LearnedValues:
        return cls(_held(fields, tensors, "rotations"))


def _held(fields: Fields, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise BoaEdgeError("the tensor is missing", where=f"{fields.where}.{name}")
    return tensors[name]


def _check_orthogonal(matrix: Tensor, shape: tuple[int, ...], where: str) -> None:
    if tuple(matrix.shape) != shape or matrix.dtype != torch.float64:
        found = f"a rotation of {matrix.dtype} and shape {list(matrix.shape)}"
        raise BoaEdgeError(found, where=where, fix=f"Expected: torch.float64, {list(shape)}")
    away = (matrix @ matrix.mT - torch.eye(shape[-1], dtype=matrix.dtype, device=matrix.device)).abs().max()
    if not float(away) < _LARGEST_DEVIATION:
        raise BoaEdgeError(f"is no rotation: R R^T is off by {float(away):.2g}", where=where)
