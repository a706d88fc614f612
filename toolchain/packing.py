"""QuantizedWeight <-> the tensors of the `compressed-tensors` pack-quantized layout, by that library's own packing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from torch import Tensor

from toolchain.quantized import QuantizedWeight

_CODES_AT_ONCE = 1 << 22  # unpacking takes up to 13 bytes for each


def pack(weight: QuantizedWeight, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors `weight_packed` int32, `weight_scale` [out, groups], `weight_shape`, maybe `weight_zero_point` int32.

    Raises:
        ValueError: `scale_dtype` cannot hold the scales exactly.
    """
    scales = weight.scales.to(scale_dtype)
    if not torch.equal(scales.to(torch.float32), weight.scales):
        raise ValueError(f"scales are not exact in {scale_dtype}")
    tensors = {
        "weight_packed": pack_to_int32(weight.codes, weight.bits),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_points is not None:
        tensors["weight_zero_point"] = pack_to_int32(weight.zero_points, weight.bits, packed_dim=0).contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor], bits: int, group_size: int | None) -> QuantizedWeight:
    """Inverse of `pack`.

    Raises:
        ValueError: the tensors do not describe a QuantizedWeight of these bits and group size.
    """
    rows, columns = (int(size) for size in tensors["weight_shape"].tolist())
    shape = torch.Size((rows, columns))
    scales = tensors["weight_scale"].to(torch.float32)
    zero_points = tensors.get("weight_zero_point")
    if zero_points is not None:
        zero_points = unpack_from_int32(zero_points, bits, torch.Size((rows, scales.shape[1])), packed_dim=0)
    return QuantizedWeight(
        codes=_unpack_rows(tensors["weight_packed"], bits, shape),
        scales=scales.contiguous(),
        zero_points=None if zero_points is None else zero_points.contiguous(),
        bits=bits,
        group_size=group_size,
    )


def _unpack_rows(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """int8 of `shape`, some rows at a time: a table of 128k tokens would take some 7 GB at once."""
    rows, columns = shape
    if tuple(packed.shape) != (rows, -(-columns * bits // 32)):
        raise ValueError(f"packed codes of shape {tuple(packed.shape)} for a weight of shape {tuple(shape)}")
    codes = torch.empty(shape, dtype=torch.int8)
    step = max(1, _CODES_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        part = packed[start : start + step]
        codes[start : start + step] = unpack_from_int32(part, bits, torch.Size((part.shape[0], columns)))
    return codes


def scheme(weight: QuantizedWeight, targets: list[str]) -> dict[str, Any]:
    """One entry of `config_groups` in a compressed-tensors `quantization_config`."""
    return {
        "targets": targets,
        "weights": {
            "num_bits": weight.bits,
            "type": "int",
            "symmetric": weight.symmetric,
            "strategy": "channel" if weight.group_size is None else "group",
            "group_size": weight.group_size,
            "dynamic": False,
            "observer": None,
        },
        "input_activations": None,
        "output_activations": None,
    }
