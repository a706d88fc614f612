"""Rotations that are folded into weights: R1 of the residual stream, R2 of each value head.

SpinQuant, arXiv 2405.16406, section 3.1; the fold of the norms' weights is that of SliceGPT, arXiv 2401.15024,
section 3. A norm's weight g is absorbed into what reads from it, W <- W diag(g). Then norm(x R) = norm(x) R for
orthogonal R, and

    R1  what reads from the stream: W <- W R1; what writes into it: W <- R1^T W, b <- b R1
    R2  rows of v in each key-value head: W <- R2 W, b <- R2 b; columns of o in its query heads: W <- W R2^T

A layer norm also subtracts the mean m of x. It commutes with rotations that leave the vector of ones where it is:
(x - m 1^T) R = x R - m 1^T, and x R has the mean x R 1 / d = m. R1 is then P R, where P reflects R 1 back to 1. The
norm's bias goes through W into the biases of what reads from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from boa_edge.errors import BoaEdgeError, UsageError
from toolchain.families import DecoderSpec
from toolchain.transforms.base import Parameters, Transform, change_rows, norm_gain, set_norm_gain
from toolchain.transforms.fields import Fields
from toolchain.transforms.hadamard import factors, random_rotation
from toolchain.transforms.product import OnlineProduct

HeadMode = Literal["tied", "untied"]


class ResidualRotation(Transform):
    """R1, left out on models that norm what their sublayers put out: those norms' weights do not commute with it.

    Attributes:
        head: "tied": embedding table, last norm and head stay as they are, and the running model computes two products
            with R1, after the embedding and before the last norm. "untied": table and head are rotated, each for
            itself, and take up memory each for itself; nothing is computed besides.
    """

    head: HeadMode

    def check_head(self) -> None:
        """Raises UsageError where `head` is none of its values."""
        if self.head not in get_args(HeadMode):
            accepted = ", ".join(get_args(HeadMode))
            raise UsageError(f"is {self.head!r}", where=f"{self.kind}: head", fix=f"Accepted: {accepted}")

    def notes(self, spec: DecoderSpec) -> list[str]:
        if spec.residual_is_plain:
            return []
        reason = "norms with weights stand between the sublayers and the residual stream"
        return [f"r1: left out, {reason} of {spec.family}"]

    def matrix(self, spec: DecoderSpec) -> Tensor:
        """R1, float64 [hidden, hidden]; rows are multiplied by it."""
        raise NotImplementedError

    def block(self, spec: DecoderSpec, layer: int, parameters: Parameters) -> dict[str, Tensor]:
        held = dict(parameters)
        if not spec.residual_is_plain:
            return held
        names, rotation = spec.layer_names[layer], self.matrix(spec)
        parts = names.parts()
        for norm, roles in ((names.attention_norm, ("q", "k", "v")), (names.mlp_norm, ("gate", "up"))):
            _absorb(spec, held, norm, [parts[role].module for role in roles if role in parts], rotation)
        for role in ("o", "down"):
            change_rows(held, parts[role], lambda rows: rotation.mT @ rows)
        return held

    def tables(self, spec: DecoderSpec, parameters: Parameters) -> dict[str, Tensor]:
        held = dict(parameters)
        if not spec.residual_is_plain or self.head == "tied":
            return held
        rotation = self.matrix(spec)
        for table in (spec.embedding, spec.position_table):
            if table is not None:
                held[f"{table}.weight"] = held[f"{table}.weight"] @ rotation
        _absorb(spec, held, spec.final_norm, [spec.head], rotation)
        return held

    def spec_after(self, spec: DecoderSpec) -> DecoderSpec:
        untied = spec.residual_is_plain and self.head == "untied"
        return replace(spec, tied_embeddings=False) if untied else spec

    def products(self, spec: DecoderSpec) -> list[OnlineProduct]:
        if not spec.residual_is_plain or self.head == "untied":
            return []
        rotation, size = self.matrix(spec), spec.hidden_size
        tables = [table for table in (spec.embedding, spec.position_table) if table is not None]
        inverse = OnlineProduct("r1_inverse", "input", spec.final_norm, size, (rotation.mT.contiguous(),))
        return [*(OnlineProduct("r1", "output", table, size, (rotation,)) for table in tables), inverse]


@dataclass(frozen=True)
class RotateResidual(ResidualRotation):
    """R1, a random Hadamard matrix."""

    kind: ClassVar[str] = "r1"
    seed: int = 0
    head: HeadMode = "tied"

    def check(self, spec: DecoderSpec) -> None:
        self.check_head()
        factors(spec.hidden_size)

    def matrix(self, spec: DecoderSpec) -> Tensor:
        rotation = random_rotation(spec.hidden_size, self.seed).mT.contiguous()
        return _fixing_ones(rotation) if spec.norm == "layer" else rotation

    def document(self) -> dict[str, object]:
        return {"seed": self.seed, "head": self.head}

    @classmethod
    def restore(cls, fields: Fields, tensors: Mapping[str, Tensor]) -> RotateResidual:
        return cls(fields.integer("seed"), cast(HeadMode, fields.choice("head", get_args(HeadMode))))


class ValueRotation(Transform):
    """R2, another one in every key-value head of every layer."""

    def matrices(self, spec: DecoderSpec, layer: int) -> Tensor:
        """R2 of each key-value head, float64 [kv heads, head size, head size]; columns are multiplied by it."""
        raise NotImplementedError

    def block(self, spec: DecoderSpec, layer: int, parameters: Parameters) -> dict[str, Tensor]:
        held, parts = dict(parameters), spec.layer_names[layer].parts()
        rotations = self.matrices(spec, layer)
        change_rows(held, parts["v"], lambda rows: (rotations @ rows.unflatten(0, (spec.kv_heads, -1))).flatten(0, 1))
        name = f"{parts['o'].module}.weight"
        heads = held[name].unflatten(1, (spec.heads, spec.head_dim)).transpose(0, 1)  # [H, d, hd]
        turned = heads @ rotations.repeat_interleave(spec.heads // spec.kv_heads, 0).mT
        held[name] = turned.transpose(0, 1).flatten(1)
        return held


@dataclass(frozen=True)
class RotateValues(ValueRotation):
    """R2, random Hadamard matrices."""

    kind: ClassVar[str] = "r2"
    seed: int = 0

    def check(self, spec: DecoderSpec) -> None:
        factors(spec.head_dim)

    def matrices(self, spec: DecoderSpec, layer: int) -> Tensor:
        return torch.stack([random_rotation(spec.head_dim, self.seed, layer, head) for head in range(spec.kv_heads)])

    def document(self) -> dict[str, object]:
        return {"seed": self.seed}

    @classmethod
    def restore(cls, fields: Fields, tensors: Mapping[str, Tensor]) -> RotateValues:
        return cls(fields.integer("seed"))


def _fixing_ones(rotation: Tensor) -> Tensor:
    """P R [d, d] with P R 1 = 1, for orthogonal R."""
    size = rotation.shape[0]
    ones = torch.full((size,), size**-0.5, dtype=rotation.dtype)
    away = rotation @ ones - ones
    if float(away.norm()) < 1e-12:
        return rotation
    away = away / away.norm()
    return rotation - 2 * torch.outer(away, away @ rotation)


def _absorb(spec: DecoderSpec, held: dict[str, Tensor], norm: str, modules: Iterable[str], rotation: Tensor) -> None:
    """Move a norm's weight and bias into the modules that read from it, and rotate what these take in.

    Where some of them have no bias, the norm's bias b stays one, b / g R.

    Raises:
        BoaEdgeError: such a bias cannot stay, as the norm's weight has zeros.
    """
    modules = list(dict.fromkeys(modules))
    gain, bias = norm_gain(spec, held, norm), held.get(f"{norm}.bias")
    if bias is not None:
        if all(f"{module}.bias" in held for module in modules):
            for module in modules:
                held[f"{module}.bias"] = held[f"{module}.bias"] + held[f"{module}.weight"] @ bias
            held[f"{norm}.bias"] = torch.zeros_like(bias)
        else:
            lifted = torch.where(bias == 0, bias, bias / gain)
            if not bool(torch.isfinite(lifted).all()):
                raise BoaEdgeError("a weight of zero stands beside a bias that is not", where=norm)
            held[f"{norm}.bias"] = lifted @ rotation
    for module in modules:
        held[f"{module}.weight"] = (held[f"{module}.weight"] * gain) @ rotation
    set_norm_gain(spec, held, norm, torch.ones_like(gain))
