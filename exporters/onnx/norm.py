"""Root mean square normalization."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph import GraphBuilder, scope


def rms_norm(g: GraphBuilder, x: ir.Value, module: str, weight: np.ndarray, epsilon: float) -> ir.Value:
    """x float32 [..., width] / rms(x) * weight [width]."""
    scale = g.floats(f"{module}.weight", weight)
    return g.op("RMSNormalization", [x, scale], f"{scope(module)}/RMSNormalization", axis=-1, epsilon=epsilon)
