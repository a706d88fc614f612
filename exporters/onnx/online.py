"""Products with fixed matrices that a transformed model owes, as plain MatMul nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from torch import Tensor

from exporters.onnx.graph import GraphBuilder
from toolchain.transforms import OnlineProduct
from toolchain.transforms.product import Place


@dataclass
class OnlineProducts:
    """Writes the products of a model where they stand. A matrix that several share is stored once."""

    g: GraphBuilder
    products: list[OnlineProduct]
    _matrices: dict[bytes, ir.Value] = field(default_factory=dict)

    def any(self, place: Place, module: str | None = None) -> bool:
        """Whether there is a product of that place, of any module or of this one."""
        return any(each.place == place and module in (None, each.module) for each in self.products)

    def at(self, x: ir.Value, module: str, place: Place, width: int, path: str) -> ir.Value:
        """x float32 [batch, sequence, width] -> x M for the products of that place, if there are any.

        M is the Kronecker product of a product's factors, once for each part of x that has their size.
        """
        for product in self.products:
            if (product.module, product.place) == (module, place):
                x = self._write(x, [self._matrix(factor) for factor in product.factors], product, width, path)
        return x

    def _write(self, x: ir.Value, matrices: list[ir.Value], product: OnlineProduct, width: int, path: str) -> ir.Value:
        g, path = self.g, f"{path}/{product.kind}"
        sizes = [factor.shape[0] for factor in product.factors]
        if sizes == [width]:
            return g.op("MatMul", [x, matrices[0]], f"{path}/MatMul")
        # [batch, sequence, width] -> [batch, sequence, count, f_1, ..., f_k]; 0 copies a dimension.
        folded = g.constant([0, 0, width // math.prod(sizes), *sizes], ir.DataType.INT64)
        x = g.op("Reshape", [x, folded], f"{path}/Reshape")
        last = 2 + len(sizes)
        for index, matrix in enumerate(matrices):
            axis = 3 + index
            if axis == last:
                x = g.op("MatMul", [x, matrix], f"{path}/{index}/MatMul")
                continue
            swap = [*range(axis), *range(axis + 1, last + 1), axis]
            back = [int(place) for place in np.argsort(swap)]
            x = g.op("Transpose", [x], f"{path}/{index}/Transpose", perm=swap)
            x = g.op("MatMul", [x, matrix], f"{path}/{index}/MatMul")
            x = g.op("Transpose", [x], f"{path}/{index}/TransposeBack", perm=back)
        flat = g.constant([0, 0, width], ir.DataType.INT64)
        return g.op("Reshape", [x, flat], f"{path}/ReshapeBack")

    def _matrix(self, factor: Tensor) -> ir.Value:
        values = factor.numpy().astype(np.float32)
        key = values.tobytes()
        if key not in self._matrices:
            self._matrices[key] = self.g.floats(f"rotations.{len(self._matrices)}", values)
        return self._matrices[key]
