"""One scale per row (token), as KleidiAI's kernels for 4-bit weights quantize their inputs on ARM.

Asymmetric is what ONNX Runtime does on ARM unless `mlas.disable_kleidiai` is set, for symmetric 4-bit weights in groups
that are multiples of 32 (`kai_run_lhs_quant_pack_qai8dxp_f32`). Its grid is the one of `per_token`: scale, zero point
and inverse by the same formulas; codes are rounded half away from zero. Measured on ONNX Runtime 1.31.1 under QEMU
(neoverse-n1: dot products, no int8 matrix products; groups of 32 and 64, one row and several): bit for bit, ties
included; once, by hand, no test repeats it. Asymmetric 4-bit weights and 8-bit weights keep one scale per block
(`per_block`). Not run: i8mm and SME kernels, real phones, XNNPACK built with KleidiAI.

The symmetric form (scale = max|x| / 127) is here to compare with; no runtime of this project is known to use it.

The effect on SmolLM2-135M (docs/log.md): one scale per row costs 5.6 times the KL of one per block, and the bundles
switch KleidiAI off for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.activations import per_block, per_token
from toolchain.activations.quantized import QuantizedActivations


def quantize(x: Tensor, *, symmetric: bool = False) -> QuantizedActivations:
    """x float32 [..., in], finite -> int8 codes, one scale per row, and zero points unless symmetric."""
    if symmetric:
        return per_block.quantize(x, x.shape[-1], "neon")
    inverse, scales, zeros = per_token.row_grid(x)
    codes = (per_block.round_half_away(x * inverse) + zeros).clamp(per_token.LOW, per_token.HIGH)
    return QuantizedActivations(codes.to(torch.int8), scales, zeros.to(torch.int32), x.shape[-1])


def fake_quantize(x: Tensor, *, symmetric: bool = False) -> Tensor:
    """`quantize(x).dequantize()`. x float32 [..., in], finite."""
    return quantize(x, symmetric=symmetric).dequantize()
