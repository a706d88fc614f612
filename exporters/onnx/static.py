"""Inputs of linears on grids that calibration has fixed: a QuantizeLinear and a DequantizeLinear before each.

Runtimes with integer kernels (NPUs) take the pair and the linear together. ONNX Runtime's CPU provider has no such
kernel for 4-bit weights: it rounds, and multiplies in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from exporters.base import Activations
from exporters.onnx.graph import GraphBuilder
from toolchain.activations import static
from toolchain.activations.plan import ActivationPlan
from toolchain.checkpoint import Checkpoint


def static_plan(checkpoint: Checkpoint, activations: Activations) -> ActivationPlan | None:
    """The checkpoint's plan where the graph rounds by ranges from calibration, None elsewhere."""
    plan = checkpoint.activations
    return plan if plan is not None and plan.format.needs_range and activations == "int8" else None


@dataclass
class StaticActivations:
    """Writes the pairs; linears that read the same input on the same grid share one."""

    g: GraphBuilder
    plan: ActivationPlan
    _made: dict[tuple[ir.Value, static.StaticGrid], ir.Value] = field(default_factory=dict)

    def at(self, x: ir.Value, module: str, path: str) -> ir.Value:
        """x float32 as `module` gets to see it: itself where the plan spares it."""
        if not self.plan.applies_to(module):
            return x
        low, high = self.plan.ranges[module]
        grid = static.grid(low, high, signed=self.plan.format.scheme == "static_int8")
        if (x, grid) not in self._made:
            g, kind = self.g, ir.DataType.INT8 if grid.signed else ir.DataType.UINT8
            on = [g.constant(grid.scale, ir.DataType.FLOAT), g.constant(grid.zero_point, kind)]
            codes = g.op("QuantizeLinear", [x, *on], f"{path}/input/QuantizeLinear")
            self._made[x, grid] = g.op("DequantizeLinear", [codes, *on], f"{path}/input/DequantizeLinear")
        return self._made[x, grid]
