"""One asymmetric int8 scale per token, as ExecuTorch's XNNPACK delegate quantizes the inputs of an "8da4w" linear.

For one row x, in float32, with low = min(x, 0) and high = max(x, 0):

    inverse     255 / (high - low); 1 where the row is 0
    scale       1 / inverse
    zero point  the end of the range whose rounding error is smaller decides: -128 - low * inverse where
                (-128 + low * inverse) + (127 + high * inverse) > 0, 127 - high * inverse otherwise;
                clamped to [-128, 127], rounded half to even
    code        clamp(round_half_even(x * inverse) + zero point, -128, 127)

Measured on ExecuTorch 1.5.1 (x86, AVX2): codes, zero points and scales agree bit for bit, ties and saturation included
(tests/toolchain/test_activations.py). The formulas are XNNPACK's (`xnn_f32_qd8_asymmetric_quantization_params` and the
f32-qs8 conversion). The reference operators of the exported program (`quantized_decomposed.
choose_qparams_per_token_asymmetric`) take scale = (high - low) / 255, at least 1.2e-7, and divide by it: scales differ
in the last bits, so do codes near ties, and rows below about 1e-5 lose precision that the delegate keeps. The delegate
is what runs.

ARM, read but not run: XNNPACK computes the grid in portable C and converts with round half to even, so the same is
expected; where it is built with KleidiAI its packed kernels quantize as in `per_row`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.activations.quantized import QuantizedActivations

LOW, HIGH = -128, 127


def row_grid(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The grid of each row.

    Args:
        x: float32 [..., in], finite.

    Returns:
        inverse, scales, zero_points: float32 [..., 1]; the zero points hold integers. Rows so small that the inverse
        overflows (below 7.5e-37) have inverse and scale 0: the delegate returns 0 for them.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    one = torch.ones_like(low)
    # Of two tensors: torch divides a number by a tensor as number * (1 / tensor), which rounds twice.
    inverse = torch.where(low == high, one, torch.div(one * (HIGH - LOW), high - low))
    tiny = torch.isinf(inverse)
    inverse = inverse.masked_fill(tiny, 0)
    scales = torch.div(one, inverse).masked_fill(tiny, 0)
    at_low, at_high = low * inverse, high * inverse
    zero_points = torch.where((LOW + at_low) + (HIGH + at_high) > 0, LOW - at_low, HIGH - at_high)
    return inverse, scales, zero_points.clamp(LOW, HIGH).round()


def quantize(x: Tensor) -> QuantizedActivations:
    """x float32 [..., in], finite -> int8 codes, one scale and zero point per row."""
    inverse, scales, zeros = row_grid(x)
    codes = (torch.round(x * inverse) + zeros).clamp(LOW, HIGH).to(torch.int8)
    return QuantizedActivations(codes, scales, zeros.to(torch.int32), x.shape[-1])


def fake_quantize(x: Tensor) -> Tensor:
    """`quantize(x).dequantize()`, without the integers. x float32 [..., in], finite."""
    inverse, scales, zeros = row_grid(x)
    # Clamped before the zero point is added: the same values, one tensor less.
    return torch.round(x * inverse).clamp(LOW - zeros, HIGH - zeros) * scales
