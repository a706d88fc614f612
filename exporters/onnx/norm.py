"""Root mean square normalization and layer normalization."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder, scope


def rms_norm(g: GraphBuilder, x: ir.Value, module: str, weight: np.ndarray, epsilon: float) -> ir.Value:
    """x float32 [..., width] / rms(x) * weight [width]."""
    scale = g.floats(f"{module}.weight", weight)
    return g.op("RMSNormalization", [x, scale], f"{scope(module)}/RMSNormalization", axis=-1, epsilon=epsilon)


def layer_norm(
    g: GraphBuilder, x: ir.Value, module: str, weight: np.ndarray, bias: np.ndarray, epsilon: float
) -> ir.Value:
    """(x float32 [..., width] - mean(x)) / std(x) * weight + bias, both [width]."""
    inputs = [x, g.floats(f"{module}.weight", weight), g.floats(f"{module}.bias", bias)]
    return g.op("LayerNormalization", inputs, f"{scope(module)}/LayerNormalization", axis=-1, epsilon=epsilon)
