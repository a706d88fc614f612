"""What a transform is, and how it changes the parameters of a block.

A transform rewrites parameters so that the model's function stays what it was. It works on mappings from full
parameter names to float64 tensors, one block at a time, and never changes a tensor that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from toolchain.families import DecoderSpec, Part
from toolchain.transforms.fields import Fields
from toolchain.transforms.product import OnlineProduct

Parameters = Mapping[str, Tensor]
_TOKENS = 16384  # rows of a table at a time


class Transform:
    """One transform with everything it needs but the model.

    Attributes:
        kind: its name in a record.
    """

    kind: ClassVar[str]

    def __deepcopy__(self, _memo: object) -> Self:
        return self  # a value: copies of a model share it

    def check(self, spec: DecoderSpec) -> None:
        """Raises BoaEdgeError where this transform and the model do not go together."""

    def notes(self, spec: DecoderSpec) -> list[str]:
        """What is left out on this model, and why."""
        return []

    def block(self, spec: DecoderSpec, layer: int, parameters: Parameters) -> dict[str, Tensor]:
        """The parameters of a block, transformed; in and out float64, by full name, shapes unchanged."""
        return dict(parameters)

    def tables(self, spec: DecoderSpec, parameters: Parameters) -> dict[str, Tensor]:
        """The same of what stands around the blocks: embedding, positions, last norm and head. Called with some tokens'
        rows of embedding and head at a time, which must be changed alike.
        """
        return dict(parameters)

    def spec_after(self, spec: DecoderSpec) -> DecoderSpec:
        """What is true of the transformed model."""
        return spec

    def products(self, spec: DecoderSpec) -> list[OnlineProduct]:
        """What the transformed model computes besides, in the order in which it does."""
        return []

    def document(self) -> dict[str, object]:
        """The fields of its entry in a record, fit for JSON."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its entry, by name."""
        return {}

    @classmethod
    def restore(cls, fields: Fields, tensors: Mapping[str, Tensor]) -> Transform:
        """The inverse of `document` and `tensors`. Raises BoaEdgeError, naming the field."""
        raise NotImplementedError


def transform_block(
    spec: DecoderSpec, transforms: Sequence[Transform], layer: int, parameters: Parameters
) -> dict[str, Tensor]:
    """The parameters of block `layer` after all transforms, computed in float64, in the dtypes that they came in."""
    return _in_float64(spec, parameters, transforms, lambda transform, own, held: transform.block(own, layer, held))


def transform_tables(spec: DecoderSpec, transforms: Sequence[Transform], parameters: Parameters) -> dict[str, Tensor]:
    """The same of what stands around the blocks; of tables as many tokens at a time as memory is worth."""
    if all(type(transform).tables is Transform.tables for transform in transforms):
        return dict(parameters)
    after = spec
    for transform in transforms:
        after = transform.spec_after(after)
    head, embedding = f"{spec.head}.weight", f"{spec.embedding}.weight"
    stays_tied = spec.tied_embeddings and after.tied_embeddings
    own = {name: tensor for name, tensor in parameters.items() if not (stays_tied and name == head)}
    tokens = own[embedding].shape[0]
    tables = [name for name in (embedding, head) if name in own]
    result: dict[str, Tensor] = {}
    for start in range(0, tokens, _TOKENS):
        held = own | {name: own[name][start : start + _TOKENS] for name in tables}
        part = _in_float64(spec, held, transforms, lambda transform, own_spec, some: transform.tables(own_spec, some))
        for name in tables:
            if part[name] is held[name]:
                part[name] = own[name]
                continue
            whole = result[name] if name in result else torch.empty_like(own[name])
            whole[start : start + _TOKENS] = part[name]
            part[name] = whole
        result = part
    return result | ({head: result[embedding]} if stays_tied and head in parameters else {})


def _in_float64(
    spec: DecoderSpec,
    parameters: Parameters,
    transforms: Sequence[Transform],
    function: Callable[[Transform, DecoderSpec, Parameters], dict[str, Tensor]],
) -> dict[str, Tensor]:
    before = {name: tensor.detach().to(torch.float64) for name, tensor in parameters.items()}
    after = dict(before)
    for transform in transforms:
        after = function(transform, spec, after)
        spec = transform.spec_after(spec)
    return {
        name: tensor if after[name] is before[name] else after[name].to(tensor.dtype)
        for name, tensor in parameters.items()
    }


def table_names(spec: DecoderSpec) -> list[str]:
    """Full names of the parameters around the blocks; a last norm may lack some of its own."""
    positions = [] if spec.position_table is None else [f"{spec.position_table}.weight"]
    norm = [f"{spec.final_norm}.weight", f"{spec.final_norm}.bias"]
    return [f"{spec.embedding}.weight", *positions, *norm, f"{spec.head}.weight"]


def change_rows(parameters: dict[str, Tensor], part: Part, change: Callable[[Tensor], Tensor]) -> None:
    """Put `change(rows)` in the place of a projection's rows: of its weight [out, in] and, as [out, 1], of its bias."""
    for leaf in ("weight", "bias"):
        name = f"{part.module}.{leaf}"
        if name not in parameters:
            continue
        tensor = parameters[name].clone()
        rows = tensor[part.rows]
        tensor[part.rows] = change(rows) if leaf == "weight" else change(rows[:, None])[:, 0]
        parameters[name] = tensor


def norm_gain(spec: DecoderSpec, parameters: Parameters, norm: str) -> Tensor:
    """What a norm multiplies with, [n]."""
    weight = parameters[f"{norm}.weight"]
    return 1 + weight if spec.norm == "rms_offset" else weight


def set_norm_gain(spec: DecoderSpec, parameters: dict[str, Tensor], norm: str, gain: Tensor) -> None:
    """Have a norm multiply with `gain` [n]."""
    parameters[f"{norm}.weight"] = gain - 1 if spec.norm == "rms_offset" else gain


def scale_norm(spec: DecoderSpec, parameters: dict[str, Tensor], norm: str, scale: Tensor) -> None:
    """Have a norm put out `scale` [n] times what it did."""
    set_norm_gain(spec, parameters, norm, norm_gain(spec, parameters, norm) * scale)
    if f"{norm}.bias" in parameters:
        parameters[f"{norm}.bias"] = parameters[f"{norm}.bias"] * scale
