"""Changes of a model's parameters that leave its function as it is, made so that it loses less when it is quantized.

A transform is one value of a class in this package; `apply` puts a model through several. Where the running model has
to compute something besides (`online_products`), `apply` and `install_runtime` add hooks that do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from toolchain.entry import decoder_layers
from toolchain.loading.source import SourceModel
from toolchain.loading.streamed import streamed_blocks
from toolchain.transforms.base import Transform, table_names, transform_block, transform_tables
from toolchain.transforms.learned import LearnedResidual, LearnedValues
from toolchain.transforms.online import RotateDown, RotateQueryKey
from toolchain.transforms.product import OnlineProduct, times
from toolchain.transforms.record import from_record, to_record
from toolchain.transforms.rotate import RotateResidual, RotateValues
from toolchain.transforms.rotate_table import RotateTable
from toolchain.transforms.runtime import (
    Runtime,
    check_transforms,
    install_runtime,
    online_products,
    transforms_of,
    turns_of,
)
from toolchain.transforms.smooth import PAIRS, Pair, Smooth, refusal, scale_shape, value_sharing

__all__ = [
    "PAIRS",
    "LearnedResidual",
    "LearnedValues",
    "OnlineProduct",
    "Pair",
    "RotateDown",
    "RotateQueryKey",
    "RotateResidual",
    "RotateTable",
    "RotateValues",
    "Runtime",
    "Smooth",
    "Transform",
    "apply",
    "from_record",
    "install_runtime",
    "online_products",
    "refusal",
    "scale_shape",
    "times",
    "to_record",
    "transform_block",
    "transform_tables",
    "transforms_of",
    "turns_of",
    "value_sharing",
]


def apply(source: SourceModel, transforms: Sequence[Transform]) -> tuple[SourceModel, list[str]]:
    """Put a model through transforms, one after the other.

    A model in memory stays as it is: the new one has parameters of its own where they differ and shares the others. A
    streamed model is changed in place; its blocks are transformed whenever they are read.

    Returns:
        the model, hooks and all, and notes of what was left out and why.

    Raises:
        BoaEdgeError: a transform and the model, or two transforms in this order, do not go together.
    """
    spec, blocks = source.spec, streamed_blocks(source.model)
    check_transforms(spec, [*transforms_of(source.model), *transforms])
    transforms = list(transforms)
    after, notes = spec, []
    for transform in transforms:
        notes += transform.notes(spec)
        after = transform.spec_after(after)
    model = source.model if blocks is not None else _sharing_copy(source.model)
    if blocks is not None:
        blocks.transform(lambda layer, parameters: transform_block(spec, transforms, layer, parameters))
    else:
        names = {id(module): name for name, module in model.named_modules()}
        for layer, block in enumerate(decoder_layers(model)):
            held = {f"{names[id(block)]}.{name}": parameter for name, parameter in block.named_parameters()}
            _put(model, held, transform_block(spec, transforms, layer, held))
    known = dict(model.named_parameters(remove_duplicate=False))
    tables: dict[str, Tensor] = {name: known[name] for name in table_names(spec) if name in known}
    _put(model, tables, transform_tables(spec, transforms, tables))
    if after.tied_embeddings and f"{spec.head}.weight" in tables:
        model.get_submodule(spec.head).weight = model.get_submodule(spec.embedding).weight
    config = source.config
    if after.tied_embeddings != spec.tied_embeddings:
        config = {**config, "tie_word_embeddings": after.tied_embeddings}
        hf: Any = model.config
        hf.tie_word_embeddings = after.tied_embeddings
    install_runtime(model, after, transforms)
    return replace(source, model=model, spec=after, config=config), notes


def _sharing_copy(model: nn.Module) -> nn.Module:
    """The same modules once more, with the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _put(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for name, tensor in after.items():
        if tensor is not before[name]:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
