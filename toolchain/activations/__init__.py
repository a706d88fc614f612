"""Activation quantization as the runtimes do it, on float32 tensors, so that it can be measured before it is deployed.

    per_token     ExecuTorch, XNNPACK "8da4w": one asymmetric int8 scale per token
    per_block     ONNX Runtime, MatMulNBits at accuracy level 4: one symmetric int8 scale per block of columns
    per_row       KleidiAI on ARM: one asymmetric int8 scale per token, other ties
    static_int8   QuantizeLinear with a calibrated range: one symmetric scale per tensor
    static_uint8  the same, asymmetric
    float         none

What was checked against the runtimes, and where, stands in each file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.activations import per_block, per_row, per_token, static
from toolchain.activations.matmul import matmul_per_block, matmul_per_token
from toolchain.activations.quantized import QuantizedActivations
from toolchain.activations.static import RangeObserver, StaticGrid

__all__ = [
    "FLOAT",
    "SCHEMES",
    "ActivationFormat",
    "QuantizedActivations",
    "RangeObserver",
    "Scheme",
    "StaticGrid",
    "error_free",
    "matmul_per_block",
    "matmul_per_token",
    "simulate",
]

Range = tuple[float, float]


@dataclass(frozen=True)
class Scheme:
    """How activations are quantized.

    Attributes:
        apply: x float32 [..., in], the weight's group size, the calibrated range -> dequantized, like x.
        needs_range: whether a calibrated range is needed (then never None in `apply`).
    """

    apply: Callable[[Tensor, int | None, Range | None], Tensor]
    needs_range: bool = False


def error_free(x: Tensor, group_size: int | None = None, static_range: Range | None = None) -> Tensor:
    """x itself: activations that stay float32."""
    return x


def _static(signed: bool) -> Scheme:
    def apply(x: Tensor, group_size: int | None, static_range: Range | None) -> Tensor:
        if static_range is None:
            raise ValueError("a static scheme needs a calibrated range")
        return static.fake_quantize(x, static.grid(*static_range, signed=signed))

    return Scheme(apply, needs_range=True)


SCHEMES: dict[str, Scheme] = {
    "per_token": Scheme(lambda x, group_size, static_range: per_token.fake_quantize(x)),
    "per_block": Scheme(
        lambda x, group_size, static_range: per_block.fake_quantize(x, per_block.block_size(group_size))
    ),
    "per_row": Scheme(lambda x, group_size, static_range: per_row.fake_quantize(x)),
    "static_int8": _static(signed=True),
    "static_uint8": _static(signed=False),
    "float": Scheme(error_free),
}


@dataclass(frozen=True)
class ActivationFormat:
    """A scheme of `SCHEMES`, and its bits: 8, the only number that the runtimes compute with (no meaning for "float").

    Raises:
        ValueError: there is no such scheme, or the bits are not 8.
    """

    scheme: str
    bits: int = 8

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"there is no activation scheme {self.scheme!r}; known: {', '.join(SCHEMES)}")
        if self.bits != 8:
            raise ValueError(f"activations have 8 bits, not {self.bits}")

    @property
    def needs_range(self) -> bool:
        return SCHEMES[self.scheme].needs_range


FLOAT = ActivationFormat("float")


def simulate(
    x: Tensor, format: ActivationFormat, *, group_size: int | None, static_range: Range | None = None
) -> Tensor:
    """Quantize and dequantize the inputs of a linear.

    Args:
        x: float32 [..., in], finite.
        group_size: columns per scale of the weight that x meets; None for one scale per output channel. Only
            `per_block` looks at it.
        static_range: smallest and largest value by calibration (`RangeObserver.range`); only for static schemes.

    Returns:
        float32, like x.

    Raises:
        ValueError: x is not float32, or a range is missing or not wanted.
    """
    if x.dtype != torch.float32:
        raise ValueError(f"activations are float32 here, not {x.dtype}")
    scheme = SCHEMES[format.scheme]
    if scheme.needs_range != (static_range is not None):
        wants = "needs a calibrated range" if scheme.needs_range else "takes no range"
        raise ValueError(f"{format.scheme} {wants}")
    return scheme.apply(x, group_size, static_range)
