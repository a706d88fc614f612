"""What a checkpoint holds beside codes, and how much all of it is."""

from __future__ import annotations

import torch

from toolchain.checkpoint import float_dtype
from toolchain.loading import SourceModel
from toolchain.recipe import Recipe
from toolchain.run import QuantizedModel
from toolchain.transforms import transforms_of


def float_parameters(source: SourceModel, quantized: QuantizedModel) -> dict[str, torch.Tensor]:
    """Parameters that stay in floating point, in the type that they are stored in."""
    tied_head = f"{source.spec.head}.weight" if source.spec.tied_embeddings else None
    transformed = bool(transforms_of(source.model))
    found = {}
    for name in source.model.state_dict():
        is_quantized = name.endswith(".weight") and name.rpartition(".")[0] in quantized.weights
        if not is_quantized and name != tied_head:
            value = source.parameter(name).detach()
            found[name] = value.to(float_dtype(source.config, value, transformed=transformed))
    return found


def payload_bytes_of(source: SourceModel, quantized: QuantizedModel, recipe: Recipe) -> int:
    """Bytes of codes, scales and zero points, and of what stays in floating point, as they are stored.

    The files have a quantized table in floating point too, for other loaders; it does not count.
    """
    floats = sum(value.numel() * value.element_size() for value in float_parameters(source, quantized).values())
    return floats + sum(weight.payload_bytes(recipe.scale_bits) for weight in quantized.weights.values())
