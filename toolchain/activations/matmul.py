"""x W^T as the runtimes compute it: integer sums per group, then scales, in float32.

Sums of integers are exact here as there. What follows is float32 in the order given below; where a kernel's vector
lanes add groups in another order, results differ in the last bits (bounds: tests/toolchain/test_activations.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.activations import per_block, per_token
from toolchain.activations.per_block import Kernel
from toolchain.activations.quantized import blocks
from toolchain.quantized import QuantizedWeight

_EXACT_FLOAT32 = 1 << 24
_XNNPACK_GROUP = 32


def matmul_per_block(x: Tensor, weight: QuantizedWeight, kernel: Kernel = "x86") -> Tensor:
    """ONNX Runtime's MatMulNBits at accuracy level 4: y = sum over blocks of (scale_x * scale_w) * integer sum.

    The integers are code_x * (code_w - zero_w). The kernels on x86 split off the zero point (8 or 128 on a symmetric
    grid) and subtract it as a float32 product of block sums, so that a result is exact only to float32 rounding of
    sums without cancellation.

    Args:
        x: float32 [..., in], finite.
        weight: [out, in], any bits, symmetric or not; without groups, in blocks of 32.

    Returns:
        float32 [..., out].
    """
    rows = x.reshape(-1, x.shape[-1])
    size = per_block.block_size(weight.group_size)
    quantized = per_block.quantize(rows, size, kernel)
    left = quantized.grouped()
    right = weight.codes.to(torch.float32)
    scales = weight.scales
    if weight.zero_points is not None:
        right = right - weight.zero_points.to(torch.float32).repeat_interleave(right.shape[1] // scales.shape[1], dim=1)
    right = blocks(right, size)
    y = x.new_zeros(rows.shape[0], right.shape[0])
    for index in range(right.shape[1]):
        total = _exact(left[:, index], right[:, index], bound=127 * 255)
        scale_w = scales[:, index if scales.shape[1] > 1 else 0]
        y += total.to(torch.float32) * (quantized.scales[:, index, None] * scale_w)
    return y.view(*x.shape[:-1], -1)


def matmul_per_token(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """ExecuTorch's XNNPACK delegate on an "8da4w" (or 8-bit per output channel) linear, without bias.

    Per output channel, bit for bit on x86: y = (float32(sum of (code_x - zero_x) * code_w) * scale_x) * scale_w.
    In groups, with scales in bfloat16: y = (zero_x * k + sum over groups of sum(code_x * code_w) * scale_w) * scale_x,
    k = -sum over groups of sum(code_w) * scale_w, each step a fused multiply-add in float32. zero_x times k cancels
    against the sum only up to float32 rounding, so that even a row of zeros (scale 1, zero point 127) can come out as
    some 1e-4 (measured).

    Not simulated: of two linears in one program with equal codes and different scales, ExecuTorch 1.5.1 computes the
    second with the scales of the first (measured, per channel and in groups; the cause was not looked for).

    Args:
        x: float32 [..., in], finite.
        weight: [out, in], symmetric; 4 bits (or less) in groups of a multiple of 32, or any bits per output channel.

    Returns:
        float32 [..., out].

    Raises:
        ValueError: the weight has zero points (the delegate would ignore them silently), or groups it does not take.
    """
    if weight.zero_points is not None:
        raise ValueError("XNNPACK ignores zero points of weights: only symmetric weights")
    size = weight.group_size
    if size is not None and (size % _XNNPACK_GROUP or weight.bits > 4):
        raise ValueError(
            f"XNNPACK takes 4 bits in groups of a multiple of 32, not {weight.bits} bits in groups of {size}"
        )
    rows = x.reshape(-1, x.shape[-1])
    quantized = per_token.quantize(rows)
    if size is None:
        total = _exact(quantized.grouped()[:, 0], weight.codes.to(torch.float32), bound=255 * 128)
        y = (total.to(torch.float32) * quantized.scales) * weight.scales[:, 0]
        return y.view(*x.shape[:-1], -1)
    assert quantized.zero_points is not None
    left = blocks(quantized.codes.to(torch.float32), size)
    right = blocks(weight.codes.to(torch.float32), size)
    scales = weight.scales.to(torch.bfloat16).to(torch.float32)
    offset = torch.zeros_like(scales[:, 0])
    for index in range(right.shape[1]):
        offset = offset - right[:, index].sum(1) * scales[:, index]
    y = quantized.zero_points.to(torch.float32) * offset
    for index in range(right.shape[1]):
        total = _exact(left[:, index], right[:, index], bound=128 * 8).to(torch.float64)
        # float64 holds the product exactly: one rounding, as in a fused multiply-add.
        y = (y.to(torch.float64) + total * scales[:, index].to(torch.float64)).to(torch.float32)
    return (y * quantized.scales).view(*x.shape[:-1], -1)


def _exact(left: Tensor, right: Tensor, bound: int) -> Tensor:
    """left [rows, k] @ right [out, k]^T of float32 integers whose products are at most `bound`, without rounding."""
    if left.shape[1] * bound < _EXACT_FLOAT32:
        return left @ right.T
    return left.to(torch.float64) @ right.to(torch.float64).T
