"""The `fused-int8` form: the fused form, with the linears of the blocks as products of int8 matrices.

For codes with one scale per output channel. Prompts are read faster than by the 4-bit kernels; the codes take 8 bits in
memory, and inputs have one scale per row instead of one per block of 32 (docs/onnx.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from exporters.onnx.decoder import Carried
from exporters.onnx.fused import FusedDecoder
from exporters.onnx.graph import scope
from exporters.onnx.integer import Rows, integer_linear, quantize_rows, store_integer
from exporters.onnx.kernels import Carrier
from toolchain.quantized import QuantizedWeight


@dataclass
class FusedInt8Decoder(FusedDecoder):
    """Linears that the checkpoint keeps in floating point, and the head, stay as the fused form has them: one scale per
    row for the head's inputs alone cost more (SmolLM2-135M) than int8 in blocks everywhere.
    """

    _rows: dict[ir.Value, Rows] = field(default_factory=dict)
    _sizes: dict[str, tuple[int, float]] = field(default_factory=dict)

    def build(self) -> None:
        super().build()
        held, stored = (sum(size[place] for size in self._sizes.values()) / 1e6 for place in (0, 1))
        self.notes.append(
            f"the codes of {len(self._sizes)} linears take {held:.1f} MB in memory ({stored:.1f} MB in the file); "
            "their inputs have one int8 scale per row"
        )

    def _integer(self, module: str, weight: QuantizedWeight) -> bool:
        return module != self.checkpoint.spec.head and weight.group_size is None and self.precision(module) == "int8"

    def carrier(self, module: str, weight: QuantizedWeight) -> Carrier:
        if self._integer(module, weight):
            return Carrier(ir.DataType.UINT8 if weight.bits == 8 else ir.DataType.INT4, fused=True)
        return super().carrier(module, weight)

    def carry(self, module: str, weight: QuantizedWeight, carrier: Carrier) -> Carrier:
        super().carry(module, weight, carrier)
        if self._integer(module, weight):
            self.linears[module] = Carried(weight.bits, carrier, weight.shape[1], by_graph=True)
        return carrier

    def product(
        self, x: ir.Value, name: str, modules: Sequence[str], weights: Sequence[QuantizedWeight], bias: ir.Value | None
    ) -> ir.Value:
        if not self._integer(modules[0], weights[0]):
            return super().product(x, name, modules, weights, bias)
        for module, weight in zip(modules, weights, strict=True):
            bits = self.carrier(module, weight).dtype.bitwidth
            self._sizes[module] = (weight.codes.numel(), weight.codes.numel() * bits / 8)
        if x not in self._rows:  # gate and up take in the same
            self._rows[x] = quantize_rows(self.g, x, f"{scope(name)}/input")
        return integer_linear(self.g, self._rows[x], scope(name), store_integer(self.g, name, weights), bias)
