"""The MLP's activation, by its name in `transformers`. A new one is one line in ACTIVATIONS."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder


def _silu(g: GraphBuilder, x: ir.Value, path: str) -> ir.Value:
    return g.op("Mul", [x, g.op("Sigmoid", [x], f"{path}/Sigmoid")], f"{path}/Mul")


ACTIVATIONS: dict[str, Callable[[GraphBuilder, ir.Value, str], ir.Value]] = {
    "silu": _silu,
    "relu": lambda g, x, path: g.op("Relu", [x], f"{path}/Relu"),
    "gelu": lambda g, x, path: g.op("Gelu", [x], f"{path}/Gelu"),
    "gelu_pytorch_tanh": lambda g, x, path: g.op("Gelu", [x], f"{path}/Gelu", approximate="tanh"),
}
"""float32 [...] -> the same shape, in standard operators."""
