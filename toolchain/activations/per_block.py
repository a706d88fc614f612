"""One symmetric int8 scale per block of columns, as ONNX Runtime's MatMulNBits quantizes its inputs (accuracy level 4).

The block is the weight's; a weight with one scale per output channel is fused with blocks of 32, the last one short if
need be. For one block of one row, in float32, with amax = max(|x|):

    scale   amax / 127
    code    round_half_even(x * (127 / amax)); 0 where the block is 0                   ("x86", in [-127, 127])
    code    round_half_away(x * (1 / scale)); 0 where the scale is 0                    ("neon")

Measured on ONNX Runtime 1.31.1:

    x86 (AVX2, no AVX-512)      4 and 8 bits, blocks of 16 to 128, one row and several, symmetric and asymmetric
                                weights: "x86", bit for bit (tests/toolchain/test_activations.py)
    ARM, KleidiAI off           4 bits, blocks of 16, 32, 64: "neon", bit for bit
    ARM                         8 bits: codes of "x86" (ties to even), results to 1e-7 (asymmetric weights; on symmetric
                                ones the kernel's own float32 corrections hide the codes)
    ARM, KleidiAI on (default)  4 bits, symmetric weights, blocks of 32 and 64: one scale per row, see `per_row`; blocks
                                of 16: "neon"; asymmetric weights: codes of "x86", results to 1e-5

ARM was emulated (QEMU 7, neoverse-n1: dot products, no int8 matrix products), once, by hand; no test repeats it. CPUs
without dot products keep activations in float32. Not run: AVX-512 and AVX-VNNI (the same formulas in MLAS's source),
int8 matrix products (i8mm), SME, real phones.

Blocks below 3.7e-37 (127 / amax overflows) have undefined codes in the kernels, different from one to the next; here
they are 0. A result is off by at most 128 times such a block's scale, below 1e-36.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from toolchain.activations.quantized import QuantizedActivations, blocks

Kernel = Literal["x86", "neon"]

PER_CHANNEL_BLOCK = 32
"""ONNX Runtime's block for a weight without groups (session.qdq_matmulnbits_block_size unset)."""

_LARGEST = 127


def block_size(group_size: int | None) -> int:
    """The block of the inputs of a weight with this group size."""
    return PER_CHANNEL_BLOCK if group_size is None else group_size


def round_half_away(x: Tensor) -> Tensor:
    """Nearest integer, ties away from zero, exact for every float32."""
    whole = torch.trunc(x)
    return whole + torch.trunc((x - whole) * 2)


def _codes(x: Tensor, size: int, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Codes as float32 [..., blocks, size] and scales [..., blocks, 1]."""
    if kernel not in ("x86", "neon"):
        raise ValueError(f"kernel must be 'x86' or 'neon', not {kernel!r}")
    grouped = blocks(x, size)
    amax = grouped.abs().amax(-1, keepdim=True)
    one = torch.ones_like(amax)
    scales = torch.div(amax, one * _LARGEST)
    # Of two tensors: torch divides a number by a tensor as number * (1 / tensor), which rounds twice.
    inverse = torch.div(one * _LARGEST, amax) if kernel == "x86" else torch.div(one, scales)
    inverse = inverse.masked_fill(torch.isinf(inverse), 0)
    scaled = grouped * inverse
    return (torch.round(scaled) if kernel == "x86" else round_half_away(scaled)), scales


def quantize(x: Tensor, size: int, kernel: Kernel = "x86") -> QuantizedActivations:
    """x float32 [..., in], finite -> int8 codes, one scale per row and `size` columns, no zero points.

    Raises:
        ValueError: size is less than 1, or there is no such kernel.
    """
    codes, scales = _codes(x, size, kernel)
    flat = codes.flatten(-2)[..., : x.shape[-1]].to(torch.int8)
    return QuantizedActivations(flat, scales.squeeze(-1), None, size)


def fake_quantize(x: Tensor, size: int, kernel: Kernel = "x86") -> Tensor:
    """`quantize(x, size, kernel).dequantize()`, without the integers. Raises what `quantize` raises."""
    codes, scales = _codes(x, size, kernel)
    return (codes * scales).flatten(-2)[..., : x.shape[-1]]
