"""Transforms as a JSON document and named tensors: `transforms.json` and `transforms.safetensors` of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from boa_edge.errors import BoaEdgeError
from toolchain.families import DecoderSpec
from toolchain.transforms.base import Transform
from toolchain.transforms.fields import Fields
from toolchain.transforms.learned import LearnedResidual, LearnedValues
from toolchain.transforms.online import RotateDown, RotateQueryKey
from toolchain.transforms.rotate import RotateResidual, RotateValues
from toolchain.transforms.rotate_table import RotateTable
from toolchain.transforms.runtime import check_transforms
from toolchain.transforms.smooth import Smooth

KINDS: dict[str, type[Transform]] = {
    each.kind: each
    for each in (
        Smooth,
        RotateResidual,
        RotateValues,
        RotateQueryKey,
        RotateDown,
        RotateTable,
        LearnedResidual,
        LearnedValues,
    )
}


def to_record(transforms: Sequence[Transform]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """One entry per transform, in order, fit for JSON; and their tensors, named `<entry>.<name>`, on the CPU."""
    document = [{"kind": transform.kind, **transform.document()} for transform in transforms]
    tensors = {
        f"{index}.{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for index, transform in enumerate(transforms)
        for name, tensor in transform.tensors().items()
    }
    return document, tensors


def from_record(
    document: Any, tensors: Mapping[str, Tensor], spec: DecoderSpec, where: str = "transforms.json"
) -> list[Transform]:
    """The transforms of a record, checked against the model they are for.

    Args:
        document: what was read from JSON.
        where: the file it came from, for errors.

    Raises:
        BoaEdgeError: a kind or field is unknown, missing or of another type; a tensor is missing, left over or of
            another shape; the transforms do not go with the model.
    """
    if not isinstance(document, list):
        raise BoaEdgeError("is no list of transforms", where=where)
    left = dict(tensors)
    transforms: list[Transform] = []
    for index, entry in enumerate(document):
        place = f"{where}: [{index}]"
        if not isinstance(entry, dict):
            raise BoaEdgeError(f"is {entry!r}", where=place, fix="Expected: a mapping with the field `kind`")
        fields = Fields(entry, place)
        kind = KINDS[fields.choice("kind", tuple(KINDS))]
        prefix = f"{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in left.items() if name.startswith(prefix)}
        transform = kind.restore(fields, own)
        fields.finish()
        for name, tensor in transform.tensors().items():
            if not isinstance(tensor, torch.Tensor):
                raise BoaEdgeError(f"{name} is no tensor", where=place)
            del left[prefix + name]
        try:
            check_transforms(spec, [transform])
        except BoaEdgeError as error:
            raise BoaEdgeError(str(error), where=place) from None
        transforms.append(transform)
    if left:
        raise BoaEdgeError(f"holds a tensor that no entry names: {min(left)}", where=where)
    try:
        check_transforms(spec, transforms)
    except BoaEdgeError as error:
        raise BoaEdgeError(str(error), where=where) from None
    return transforms
