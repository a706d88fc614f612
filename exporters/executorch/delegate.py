"""One XNNPACK delegate, written operator by operator in the schema that ExecuTorch's XNNPACK backend reads.

ExecuTorch's own way to a delegate goes through torch.export, decompositions and a partitioner, and took 9 minutes for
30 layers (docs/log.md). The graph is known here, so it is written down as it is, with the checkpoint's codes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_FLAG_TRANSPOSE_WEIGHTS,
    XNN_INVALID_VALUE_ID,
    XNN_VALUE_FLAG_EXTERNAL_INPUT,
    XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
)

from exporters.executorch.constants import Constants, bfloat16_bits, pack_int4
from toolchain.quantized import QuantizedWeight

Dims = tuple[int, ...]

_NO_HANDLE = 65535
_DYNAMIC = schema.PerTokenDynamicQuant(num_nonbatch_dims=1)


@dataclass(frozen=True)
class Value:
    """A tensor of the delegate. `dims` are the largest that it can have; the number of tokens may be smaller."""

    id: int
    dims: Dims


class Delegate:
    """Appends operators to one delegate.

    Attributes:
        inputs, outputs: in the order in which the program passes them.
        operators: how often each kind of operator stands in it, by its name in the schema.
    """

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.operators: Counter[str] = Counter()
        self._values: list[schema.XValue] = []
        self._nodes: list[schema.XNode] = []
        self._data = [schema.ConstantDataOffset(0, 0)]
        self._known: dict[str, Value] = {}

    def input(self, dims: Dims) -> Value:
        """A float32 tensor that the program passes in. All inputs come before the first output."""
        value = self._value(dims)
        self._external(value, len(self.inputs), XNN_VALUE_FLAG_EXTERNAL_INPUT)
        self.inputs.append(value)
        return value

    def output(self, value: Value) -> None:
        """Hand `value` out; not an input, and each once."""
        self._external(value, len(self.inputs) + len(self.outputs), XNN_VALUE_FLAG_EXTERNAL_OUTPUT)
        self.outputs.append(value)

    def constant(self, values: np.ndarray) -> Value:
        """float32 values of any shape with at least one dimension."""
        array = np.ascontiguousarray(values, dtype=np.float32)
        name = self.constants.add("float", array)
        if name not in self._known:
            self._known[name] = self._value(array.shape, data=self._datum(name, array.nbytes))
        return self._known[name]

    def scalar(self, value: float) -> Value:
        """float32 [1]."""
        return self.constant(np.asarray([value], np.float32))

    def add(self, left: Value, right: Value) -> Value:
        """left + right, broadcast."""
        return self._binary(schema.XNNAdd, left, right)

    def subtract(self, left: Value, right: Value) -> Value:
        """left - right, broadcast."""
        return self._binary(schema.XNNSubtract, left, right)

    def maximum(self, left: Value, right: Value) -> Value:
        """The larger one, broadcast."""
        return self._binary(schema.XNNMaximum, left, right)

    def multiply(self, left: Value, right: Value) -> Value:
        """left * right, broadcast."""
        return self._binary(schema.XNNMultiply, left, right)

    def divide(self, left: Value, right: Value) -> Value:
        """left / right, broadcast."""
        return self._binary(schema.XNNDiv, left, right)

    def square(self, x: Value) -> Value:
        """x^2."""
        return self._unary(schema.XNNSquare, x)

    def square_root(self, x: Value) -> Value:
        """The square root."""
        return self._unary(schema.XNNSquareRoot, x)

    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + e^-x)."""
        return self._unary(schema.XNNSigmoid, x)

    def tanh(self, x: Value) -> Value:
        """The hyperbolic tangent."""
        return self._unary(schema.XNNTanh, x)

    def gelu(self, x: Value) -> Value:
        """x times the normal distribution's integral up to x."""
        return self._unary(schema.XNNGelu, x)

    def softmax(self, x: Value) -> Value:
        """e^x over its sum along the last axis."""
        return self._unary(schema.XNNSoftmax, x)

    def batched(self, left: Value, right: Value, *, transposed: bool = False) -> Value:
        """left [n, a, b] times right [n, b, c], or [n, c, b] if `transposed` -> [n, a, c]. None is a constant."""
        y = self._value((*left.dims[:-1], right.dims[-2 if transposed else -1]))
        flags = XNN_FLAG_TRANSPOSE_WEIGHTS if transposed else 0  # (of the same value as XNN_FLAG_TRANSPOSE_B)
        self._node(schema.XNNBatchMatrixMultiply(left.id, right.id, y.id, flags))
        return y

    def reshape(self, x: Value, dims: Dims, tokens: int) -> Value:
        """x in the shape `dims`, of which the axis `tokens` follows from the others."""
        if math.prod(dims) != math.prod(x.dims):
            raise ValueError(f"{x.dims} cannot become {dims}")
        y = self._value(dims)
        shape = [0 if axis == tokens else size for axis, size in enumerate(dims)]
        self._node(schema.XNNStaticReshape(len(dims), shape, x.id, y.id, 0))
        return y

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        """Axis i of the result is axis order[i] of x."""
        y = self._value(tuple(x.dims[axis] for axis in order))
        self._node(schema.XNNStaticTranspose(len(order), list(order), x.id, y.id, 0))
        return y

    def quantize(self, x: Value) -> Value:
        """x [..., in] in int8, one asymmetric scale per row, as `toolchain.activations.per_token`."""
        y = self._value(x.dims, schema.XNNDatatype.xnn_datatype_qdint8, _DYNAMIC)
        self._node(schema.XNNConvert(x.id, y.id, 0))
        return y

    def linear(self, x: Value, weight: np.ndarray, bias: np.ndarray | None = None) -> Value:
        """x float32 [..., in] W^T + b for W float32 [out, in]."""
        return self._fully_connected(x, self.constant(weight), bias)

    def quantized_linear(self, x: Value, weight: QuantizedWeight, bias: np.ndarray | None = None) -> Value:
        """The same for codes, with x from `quantize`; or float32, for codes with one scale per output channel.

        Raises:
            ValueError: XNNPACK has no such weight (`exporters.executorch.lowerable` says why).
        """
        held = self._values[x.id].xvalue_union
        if bias is None or isinstance(held, schema.XNNQuantizedTensorValue):
            return self._fully_connected(x, self._codes(weight), bias)
        # Of float32 inputs XNNPACK computes (x codes + bias) scales (measured).
        return self.add(self._fully_connected(x, self._codes(weight), None), self.constant(bias))

    def serialize(self) -> bytes:
        """The delegate as the runtime loads it; the constants' bytes stand elsewhere."""
        graph = schema.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=len(self.inputs) + len(self.outputs),
            input_ids=[value.id for value in self.inputs],
            output_ids=[value.id for value in self.outputs],
            constant_data=self._data,
        )
        return serialize_xnnpack_binary(graph, bytearray())

    def _codes(self, weight: QuantizedWeight) -> Value:
        if weight.zero_points is not None and bool(weight.zero_points.any()):
            raise ValueError("XNNPACK ignores the zero points of weights")
        rows, columns = weight.shape
        grouped = weight.group_size is not None
        if weight.bits == 8:
            if grouped:
                raise ValueError("XNNPACK has no 8-bit weights in groups")
            dtype, codes = schema.XNNDatatype.xnn_datatype_qcint8, weight.codes.numpy()
        else:
            if columns % 2:
                raise ValueError(f"{columns} inputs are odd")
            dtype = schema.XNNDatatype.xnn_datatype_qbint4 if grouped else schema.XNNDatatype.xnn_datatype_qcint4
            codes = pack_int4(weight.codes)
        scales = bfloat16_bits(weight.scales) if grouped else weight.scales.numpy()
        name = self.constants.add(f"codes{weight.bits}", codes, scales)
        if name in self._known:
            return self._known[name]
        scale_name = self.constants.add("scales", scales)
        data = self._datum(name, codes.nbytes)
        scale_data = self._datum(scale_name, scales.nbytes)
        quantization: schema.XNNQuantParams
        if weight.group_size is not None:
            quantization = schema.PerChannelGroupQuant(
                [], 0, weight.group_size, scale_buffer_idx=scale_data, num_scales=scales.size
            )
        else:
            quantization = schema.PerChannelQuant([], 0, scale_buffer_idx=scale_data, num_scales=scales.size)
        self._known[name] = self._value((rows, columns), dtype, quantization, data)
        return self._known[name]

    def _fully_connected(self, x: Value, weight: Value, bias: np.ndarray | None) -> Value:
        bias_id = XNN_INVALID_VALUE_ID if bias is None else self.constant(bias).id
        y = self._value((*x.dims[:-1], weight.dims[0]))
        self._node(schema.XNNFullyConnected(x.id, weight.id, bias_id, y.id, 0))
        return y

    def _unary(self, kind: type[schema.XNNNode1x1], x: Value) -> Value:
        y = self._value(x.dims)
        self._node(kind(x.id, y.id, 0))
        return y

    def _binary(self, kind: type[schema.XNNNode2x1], left: Value, right: Value) -> Value:
        y = self._value(tuple(np.broadcast_shapes(left.dims, right.dims)))
        self._node(kind(left.id, right.id, y.id, 0))
        return y

    def _node(self, node: schema.XNodeUnion) -> None:
        self._nodes.append(schema.XNode(node, _NO_HANDLE))
        self.operators[type(node).__name__.removeprefix("XNN")] += 1

    def _datum(self, name: str, size: int) -> int:
        self._data.append(schema.ConstantDataOffset(UINT64_MAX, size, name))
        return len(self._data) - 1

    def _value(
        self,
        dims: Dims,
        dtype: schema.XNNDatatype = schema.XNNDatatype.xnn_datatype_fp32,
        quantization: schema.XNNQuantParams | None = None,
        data: int = 0,
    ) -> Value:
        value = Value(len(self._values), tuple(int(size) for size in dims))
        tensor = schema.XNNTensorValue(
            datatype=dtype,
            num_dims=len(dims),
            dims=list(value.dims),
            constant_buffer_idx=data,
            external_id=XNN_INVALID_VALUE_ID,
            flags=0,
            id_out=value.id,
        )
        held = tensor if quantization is None else schema.XNNQuantizedTensorValue(tensor, quantization)
        self._values.append(schema.XValue(held))
        return value

    def _external(self, value: Value, place: int, flag: int) -> None:
        tensor = self._values[value.id].xvalue_union
        if not isinstance(tensor, schema.XNNTensorValue) or tensor.flags or tensor.constant_buffer_idx:
            raise ValueError("only a computed float32 value goes in or out, and only once")
        tensor.external_id, tensor.flags = place, flag
