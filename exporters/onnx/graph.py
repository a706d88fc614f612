"""A graph under construction: nodes in order, initializers by name, small constants stored once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.weights import WeightFile

Dimension = int | str

_INDEX = re.compile(r"\.(\d+)")


def scope(module: str) -> str:
    """`model.layers.0.self_attn.q_proj` -> `/model/layers.0/self_attn/q_proj`, the path of its nodes."""
    return "/" + _INDEX.sub("\0\\1", module).replace(".", "/").replace("\0", ".")


class GraphBuilder:
    """Collects nodes and initializers. Large tensors go to `weights` at once; what is below a page stays in the graph.

    Attributes:
        opset: version of the standard operator set.
        domains: versions of the other operator sets that are used; none where it can be avoided.
    """

    def __init__(self, weights: WeightFile, opset: int) -> None:
        self.weights = weights
        self.opset = opset
        self.domains: dict[str, int] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dimension]) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._inputs.append(value)
        return value

    def optional_input(self, name: str, values: Sequence[int]) -> ir.Value:
        """Declare an int64 input of one dimension that is `values` where the caller gives none."""
        value = self.initializer(ir.tensor(np.asarray(values, np.int64), name=name))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[Dimension]) -> None:
        """Make `value` a graph output under `name`."""
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self._outputs.append(value)

    def op(self, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes: object) -> ir.Value:
        """Append a node with one output."""
        return self.ops(kind, inputs, name, 1, **attributes)[0]

    def contrib(self, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes: object) -> ir.Value:
        """Append a node of ONNX Runtime's own operator set, with one output."""
        return self.contribs(kind, inputs, name, (0,), **attributes)[0]

    def contribs(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, used: Sequence[int], **attributes: object
    ) -> tuple[ir.Value, ...]:
        """Append a node of ONNX Runtime's own operator set; gives the outputs `used`, in that order."""
        self.domains["com.microsoft"] = 1
        values = self._append("com.microsoft", kind, inputs, name, max(used) + 1, attributes)
        for index, value in enumerate(values):
            if index not in used:
                value.name = ""
        return tuple(values[index] for index in used)

    def ops(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, outputs: int, **attributes: object
    ) -> tuple[ir.Value, ...]:
        """Append a node with several outputs; `name` is its path, e.g. `/model/layers.0/self_attn/q_proj/MatMul`."""
        return self._append("", kind, inputs, name, outputs, attributes)

    def _append(
        self,
        domain: str,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: int,
        attributes: dict[str, object],
    ) -> tuple[ir.Value, ...]:
        given: dict[str, Any] = attributes
        node = ir.node(kind, inputs, given, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}_output_{index}"
        self._nodes.append(node)
        return tuple(node.outputs)

    def floats(self, name: str, values: np.ndarray) -> ir.Value:
        """A float32 initializer in the weight file."""
        return self.initializer(self.weights.floats(name, values))

    def codes(self, name: str, values: np.ndarray, dtype: ir.DataType) -> ir.Value:
        """An INT2, INT4 or INT8 initializer in the weight file."""
        return self.initializer(self.weights.codes(name, values, dtype))

    def raw(self, name: str, values: np.ndarray) -> ir.Value:
        """A uint8 initializer in the weight file."""
        return self.initializer(self.weights.raw(name, values))

    def alias(self, name: str, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """A second initializer over the bytes of the first: once on disk, yet two tensors for the runtime."""
        assert isinstance(value.const_value, ir.ExternalTensor)
        return self.initializer(self.weights.alias(name, value.const_value, shape))

    def constant(self, values: Sequence[int] | Sequence[float] | int | float, dtype: ir.DataType) -> ir.Value:
        """A small constant, kept inside the graph and shared by all who ask for the same."""
        array = np.asarray(values, dtype=dtype.numpy())
        text = "_".join(str(item) for item in array.reshape(-1).tolist()) if array.size < 5 else str(len(self._nodes))
        name = f"/constants/{dtype.name.lower()}/{'x'.join(map(str, array.shape)) or 'scalar'}/{text}"
        if name in self._initializers:
            return self._initializers[name]
        return self.initializer(ir.tensor(array, name=name))

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Register a tensor under its own name."""
        assert tensor.name is not None
        if tensor.name in self._initializers:
            raise ValueError(f"initializer {tensor.name!r} exists already")
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._initializers[tensor.name] = value
        return value

    def save(self, path: Path, producer_version: str) -> None:
        """Write the graph; its large tensors stand in the weight file already."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": self.opset, **self.domains},
            name="decoder",
        )
        # INT2 exists since IR version 13; opset 23 came with 11.
        version = 11 if self.opset <= 23 else 13
        ir.save(ir.Model(graph, ir_version=version, producer_name="boa-edge", producer_version=producer_version), path)
