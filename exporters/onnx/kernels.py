"""What the CPU provider of ONNX Runtime 1.31 runs fast, as measured (docs/onnx.md), and how codes are carried to it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.base import Activations

FUSED_GROUPS = (16, 32, 64, 128, 256)
"""Group sizes that become a MatMulNBits kernel; so does one scale per output channel."""

_INT2_GROUPS = (32, 64, 128, None)
# ONNX Runtime 1.31 turns a matrix of INT2 around when it fuses it, and gets it wrong where rows do not fill bytes.
_INT2_ROWS = 4

# Level 4 quantizes the inputs of a fused kernel to int8 in blocks; 1 keeps them float32. An unset level means 4.
ACCURACY_KEY = "session.qdq_matmulnbits_accuracy_level"
ACCURACY_LEVEL: dict[Activations, str] = {"int8": "4", "float32": "1"}
FLOAT_INPUTS = {ACCURACY_KEY: "1", "mlas.qnbit.force_fp32": "1"}
"""Whatever the bundle says: inputs in float32. The second is for nodes that state a level of their own."""
# With int8 inputs on ARM the KleidiAI kernels quantize a whole row with one scale, the runtime's own one per block: on
# SmolLM2-135M with the same weights, mean KL from float32 inputs 0.0267 against 0.0048 nats (docs/log.md; emulated
# Cortex-A76, 96 tokens). Off, ARM computes as x86 does, in 1.6 times the instructions. Which is faster on a phone has
# not been measured.
_KLEIDIAI_KEY = "mlas.disable_kleidiai"


def session_config(activations: Activations) -> dict[str, str]:
    """The options of an ONNX Runtime session that decide how quantized linears are computed."""
    level = {ACCURACY_KEY: ACCURACY_LEVEL[activations]}
    return level | {_KLEIDIAI_KEY: "1"} if activations == "int8" else level


def as_planned(config: dict[str, str], scheme: str | None) -> dict[str, str]:
    """Options for a checkpoint whose activations were quantized by `scheme`: one for KleidiAI's rows gets KleidiAI."""
    return {key: value for key, value in config.items() if scheme != "per_row" or key != _KLEIDIAI_KEY}


def per_node_config(activations: Activations) -> dict[str, str]:
    """The same options for a graph whose nodes state their precision themselves."""
    return {key: value for key, value in session_config(activations).items() if key != ACCURACY_KEY}


@dataclass(frozen=True)
class Carrier:
    """How the codes of one linear stand in the graph.

    Attributes:
        dtype: INT2, INT4 or INT8. The integer values are always the checkpoint's.
        fused: whether the runtime turns DequantizeLinear and MatMul into one kernel over the codes. Where that kernel
            is slower than the pair (8 bits with float32 activations), the pair is written so that it stays a pair.
    """

    dtype: ir.DataType
    fused: bool


def carrier(bits: int, group_size: int | None, activations: Activations) -> Carrier:
    """The fastest form for a linear of these bits and this group size."""
    if bits == 8:
        return Carrier(ir.DataType.INT8, fused=activations == "int8")
    if bits == 2 and activations == "int8" and group_size in _INT2_GROUPS:
        return Carrier(ir.DataType.INT2, fused=True)
    return Carrier(ir.DataType.INT4, fused=True)


def dequantized_carrier(bits: int, group_size: int | None, rows: int, activations: Activations) -> Carrier:
    """The same for codes [in, rows] behind a DequantizeLinear, which the runtime turns around when it fuses them."""
    chosen = carrier(bits, group_size, activations)
    if chosen.dtype == ir.DataType.INT2 and rows % _INT2_ROWS:
        return Carrier(ir.DataType.INT4, fused=True)
    return chosen


def static_carrier(bits: int, group_size: int | None) -> Carrier:
    """The same behind inputs that a QuantizeLinear rounds: the runtime's product of int8 matrices, which takes their
    place at 8 bits, knows no groups, and at 2 bits the graph that it makes is invalid."""
    if bits == 8:
        return Carrier(ir.DataType.INT8, fused=group_size is None)
    return Carrier(ir.DataType.INT4, fused=True)
