"""SmoothQuant's scales (arXiv 2211.10438, eq. 3) between the last norm and the head, where the table may be tied.

    last norm's weight (and bias) / s, columns of the head * s      s [hidden]

A tied table is the embedding's too: what is looked up comes out multiplied by s, and the running model divides by s
again, one product of [hidden] numbers for each token. An untied head owes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from boa_edge.errors import BoaEdgeError
from toolchain.families import DecoderSpec
from toolchain.transforms.base import Parameters, Transform, scale_norm
from toolchain.transforms.fields import Fields
from toolchain.transforms.product import OnlineProduct


@dataclass(frozen=True, eq=False)
class SmoothHead(Transform):
    """Scales of what the head takes in.

    Attributes:
        scale: positive [hidden].
    """

    kind: ClassVar[str] = "smooth_head"
    scale: Tensor

    def check(self, spec: DecoderSpec) -> None:
        where = f"{self.kind}: scale"
        if tuple(self.scale.shape) != (spec.hidden_size,):
            raise BoaEdgeError(
                f"has the shape {list(self.scale.shape)}", where=where, fix=f"Expected: [{spec.hidden_size}]"
            )
        if not self.scale.is_floating_point() or not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise BoaEdgeError("scales must be positive and finite", where=where)

    def tables(self, spec: DecoderSpec, parameters: Parameters) -> dict[str, Tensor]:
        held = dict(parameters)
        head, embedding = f"{spec.head}.weight", f"{spec.embedding}.weight"
        table = held[embedding if spec.tied_embeddings else head]
        scale = self.scale.to(table)
        scale_norm(spec, held, spec.final_norm, 1 / scale)
        scaled = table * scale
        for name in (embedding, head) if spec.tied_embeddings else (head,):
            if name in held:  # a tied head may have no entry of its own
                held[name] = scaled
        return held

    def products(self, spec: DecoderSpec) -> list[OnlineProduct]:
        if not spec.tied_embeddings:
            return []
        inverse = 1 / self.scale.to(torch.float64)
        return [OnlineProduct(self.kind, "output", spec.embedding, spec.hidden_size, (inverse,))]

    def document(self) -> dict[str, object]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    @classmethod
    def restore(cls, fields: Fields, tensors: Mapping[str, Tensor]) -> SmoothHead:
        if "scale" not in tensors:
            raise BoaEdgeError("the tensor of 'scale' is missing", where=f"{fields.where}.scale")
        return cls(tensors["scale"])
