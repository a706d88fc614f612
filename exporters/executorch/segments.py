"""What a decoder computes between two attentions, as one XNNPACK delegate each.

Delegate 0 ends with q, k and v of the first layer; each one after it takes a layer's attention context and goes on to
q, k and v of the next; the last one goes on to the logits, of one position only. Whole stretches and not one delegate
per linear, since every call of a delegate costs time.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from torch import Tensor

from boa_edge.errors import BoaEdgeError
from exporters.base import Activations
from exporters.executorch.cache import Kept
from exporters.executorch.capped import attend
from exporters.executorch.constants import Constants
from exporters.executorch.delegate import Delegate, Value
from exporters.executorch.lowerable import Lengths
from toolchain.checkpoint import Checkpoint
from toolchain.families import DecoderSpec, Part
from toolchain.quantized import QuantizedWeight
from toolchain.transforms import OnlineProduct, online_products
from toolchain.transforms.product import Place


def rows_of(weight: QuantizedWeight, part: Part) -> QuantizedWeight:
    """The rows of a projection that shares its module with others."""
    zeros = None if weight.zero_points is None else weight.zero_points[part.rows]
    return QuantizedWeight(weight.codes[part.rows], weight.scales[part.rows], zeros, weight.bits, weight.group_size)


def attends_in_delegates(spec: DecoderSpec) -> bool:
    """Whether attention is part of the delegate behind it, for want of an operator that could do it."""
    return spec.attention_softcap is not None


class Segments:
    """Writes the delegates of one decoder.

    Attributes:
        linears: modules that stand as integer codes, the head among them.
        kept: modules whose codes stand dequantized, since XNNPACK has none in groups for float32 inputs.
    """

    def __init__(self, checkpoint: Checkpoint, constants: Constants, activations: Activations) -> None:
        self.checkpoint, self.constants, self.spec = checkpoint, constants, checkpoint.spec
        self.activations = activations
        self.products = online_products(checkpoint.spec, checkpoint.transforms)
        self.linears: set[str] = set()
        self.kept: set[str] = set()

    def build(self, index: int, lengths: Lengths) -> Delegate:
        """Delegate `index`, 0 to the number of layers, for as many tokens as one call takes (the last one: for one).

        It takes what attention hands on (all but the first): context [1, S, heads, head_dim], or q [1, S, heads,
        head_dim], keys and values [1, slots, kv_heads, head_dim] and a mask [S, slots]; x [1, S, hidden]; learned
        positions [1, S, hidden] (the first, where there are some); and the next layer's cos and sin [1, S, 1, head_dim]
        where it turns. It hands out q [1, S, heads, head_dim], k, v [1, S, kv_heads, head_dim] and x where it has
        changed, or logits [1, 1, vocabulary].
        """
        spec, d = self.spec, Delegate(self.constants)
        tokens = 1 if index == spec.layers else lengths.prefill
        seen = self._seen(d, tokens, Kept.of(spec.attention[index - 1], lengths)) if index else []
        x = x_in = d.input((1, tokens, spec.hidden_size))
        if index == spec.layers:
            d.output(self._logits(d, self._after_attention(d, seen, x, index - 1)))
            return d
        added = d.input(x.dims) if not index and spec.position_table is not None else None
        turns = bool(spec.attention[index].rope_inv_freq)
        turn = (d.input((1, tokens, 1, spec.head_dim)), d.input((1, tokens, 1, spec.head_dim))) if turns else None
        x = self._after_attention(d, seen, x, index - 1) if index else self._embedded(d, x, added)
        for value in self._queries_keys_values(d, x, index, turn):
            d.output(value)
        if x is not x_in:
            d.output(x)
        return d

    def _seen(self, d: Delegate, tokens: int, kept: Kept) -> list[Value]:
        """The inputs that come from attention."""
        spec = self.spec
        first = d.input((1, tokens, spec.heads, spec.head_dim))
        if not attends_in_delegates(spec):
            return [first]
        cache = (1, kept.slots, spec.kv_heads, spec.head_dim)
        return [first, d.input(cache), d.input(cache), d.input((tokens, kept.slots))]

    def _embedded(self, d: Delegate, x: Value, added: Value | None) -> Value:
        spec = self.spec
        if spec.embedding_scale != 1.0:
            x = d.multiply(x, d.scalar(spec.embedding_scale))
        x = self._product(d, x, spec.embedding, "output")
        if added is None:
            return x
        assert spec.position_table is not None
        return d.add(x, self._product(d, added, spec.position_table, "output"))

    def _queries_keys_values(
        self, d: Delegate, x: Value, layer: int, turn: tuple[Value, Value] | None
    ) -> tuple[Value, Value, Value]:
        spec, names = self.spec, self.spec.layer_names[layer]
        parts = names.parts()
        h = _Input(self._norm(d, x, names.attention_norm))
        half = len(spec.attention[layer].rope_inv_freq)

        def heads(role: str, count: int, norm: str | None, turned: bool) -> Value:
            y = self._linear(d, h, parts[role])
            y = d.reshape(y, (1, y.dims[1], count, spec.head_dim), tokens=1)
            if norm is not None:
                y = self._norm(d, y, norm)
            if turned and turn is not None:
                y = _turned(d, y, turn, half)
            return self._product(d, y, names.q.rpartition(".")[0], "query_key") if turned else y

        return (
            heads("q", spec.heads, names.q_norm, True),
            heads("k", spec.kv_heads, names.k_norm, True),
            heads("v", spec.kv_heads, None, False),
        )

    def _after_attention(self, d: Delegate, seen: list[Value], x: Value, layer: int) -> Value:
        spec, names = self.spec, self.spec.layer_names[layer]
        parts = names.parts()
        if attends_in_delegates(spec):
            context = attend(d, spec, *seen)
        else:
            context = d.reshape(seen[0], (1, x.dims[1], spec.heads * spec.head_dim), tokens=1)
        context = self._product(d, context, names.o, "input")
        x = d.add(x, self._after(d, self._linear(d, _Input(context), parts["o"]), names.attention_output_norm))
        h = _Input(self._norm(d, x, names.mlp_norm))
        y = self._linear(d, h, parts["up"])
        if "gate" in parts:
            y = d.multiply(self._activation(d, self._linear(d, h, parts["gate"])), y)
        else:
            y = self._activation(d, y)
        y = self._product(d, y, names.down, "input")
        return d.add(x, self._after(d, self._linear(d, _Input(y), parts["down"]), names.mlp_output_norm))

    def _logits(self, d: Delegate, x: Value) -> Value:
        spec = self.spec
        x = self._norm(d, self._product(d, x, spec.final_norm, "input"), spec.final_norm)
        x = self._product(d, x, spec.head, "input")
        source = spec.embedding if spec.tied_embeddings else spec.head
        if self.checkpoint.is_quantized(spec.head):
            weight = self.checkpoint.quantized(spec.head)
            if spec.tied_embeddings and weight.bits != 8:
                x, weight = _swapped(d, x), swapped_columns(weight)
            y = self._codes(d, _Input(x), spec.head, weight, None)
        else:
            y = d.linear(x, self._parameter(f"{source}.weight"))
        if spec.logit_softcap is not None:
            cap = d.scalar(spec.logit_softcap)
            y = d.multiply(d.tanh(d.divide(y, cap)), cap)
        return y

    def _after(self, d: Delegate, y: Value, norm: str | None) -> Value:
        return y if norm is None else self._norm(d, y, norm)

    def _norm(self, d: Delegate, x: Value, module: str) -> Value:
        """x / rms(x) * w, or of x minus its mean, plus a bias. XNNPACK has no mean over the last axis in this schema:
        it is a product with 1 / n.
        """
        weight = self._parameter(f"{module}.weight")
        if self.spec.norm == "rms_offset":
            weight = weight + np.float32(1)
        width = x.dims[-1]
        mean = np.full((1, width), 1 / width, np.float32)
        if self.spec.norm == "layer":
            x = d.subtract(x, d.linear(x, mean))
        root = d.square_root(d.add(d.linear(d.square(x), mean), d.scalar(self.spec.norm_eps)))
        y = d.multiply(d.divide(x, root), d.constant(weight))
        bias = f"{module}.bias"
        return d.add(y, d.constant(self._parameter(bias))) if self.checkpoint.has(bias) else y

    def _activation(self, d: Delegate, x: Value) -> Value:
        if self.spec.activation == "silu":
            return d.multiply(x, d.sigmoid(x))
        if self.spec.activation == "relu":
            return d.maximum(x, d.scalar(0.0))
        if self.spec.activation == "gelu":
            return d.gelu(x)
        # x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the approximation that Gemma is trained with.
        cube = d.multiply(d.multiply(d.square(x), x), d.scalar(0.044715))
        inner = d.multiply(d.add(x, cube), d.scalar(math.sqrt(2 / math.pi)))
        return d.multiply(d.multiply(x, d.scalar(0.5)), d.add(d.tanh(inner), d.scalar(1.0)))

    def _linear(self, d: Delegate, x: _Input, part: Part) -> Value:
        name = f"{part.module}.bias"
        bias = self._parameter(name)[part.rows] if self.checkpoint.has(name) else None
        if not self.checkpoint.is_quantized(part.module):
            return d.linear(x.value, self._parameter(f"{part.module}.weight")[part.rows], bias)
        return self._codes(d, x, part.module, rows_of(self.checkpoint.quantized(part.module), part), bias)

    def _codes(self, d: Delegate, x: _Input, module: str, weight: QuantizedWeight, bias: np.ndarray | None) -> Value:
        plan = self.checkpoint.activations
        in_float = self.activations == "float32" or (plan is not None and module in plan.kept)
        if in_float and weight.group_size is not None:
            self.kept.add(module)
            return d.linear(x.value, weight.dequantize().numpy(), bias)
        self.linears.add(module)
        return d.quantized_linear(x.value if in_float else x.quantized(d), weight, bias)

    def _product(self, d: Delegate, x: Value, module: str, place: Place) -> Value:
        for product in self.products:
            if (product.module, product.place) == (module, place):
                x = _times(d, x, product)
        return x

    def _parameter(self, name: str) -> np.ndarray:
        values: np.ndarray = self.checkpoint.tensor(name).float().numpy()
        # Looked at here, since int8 activations make numbers of whatever comes in.
        if not np.isfinite(values).all():
            where = f"{self.checkpoint.path / 'model.safetensors'}: {name}"
            raise BoaEdgeError("has values that are not finite", where=where, fix="Quantize the model again")
        return values


def swapped_columns(table: QuantizedWeight) -> QuantizedWeight:
    """A table of 4 bits or fewer with the columns of each pair exchanged.

    Its bytes as XNNPACK reads them are those of the table as the lookup reads it, which has the halves of a byte the
    other way round: so a tied table stands once (`sharing`). Groups are even, so scales stay where they are.
    """
    return replace(table, codes=table.codes.unflatten(1, (-1, 2)).flip(2).flatten(1))


def _swapped(d: Delegate, x: Value) -> Value:
    """x [1, 1, hidden] with the values of each pair exchanged, exactly."""
    pairs = d.reshape(x, (1, 1, x.dims[-1] // 2, 2), tokens=1)
    return d.reshape(d.linear(pairs, np.asarray([[0, 1], [1, 0]], np.float32)), x.dims, tokens=1)


class _Input:
    """A linear's input, quantized at most once for all linears that take it."""

    def __init__(self, value: Value) -> None:
        self.value = value
        self._quantized: Value | None = None

    def quantized(self, d: Delegate) -> Value:
        if self._quantized is None:
            self._quantized = d.quantize(self.value)
        return self._quantized


def _turned(d: Delegate, x: Value, turn: tuple[Value, Value], half: int) -> Value:
    """RoPE on x [1, S, heads, head_dim]: x cos + (x P) sin.

    P swaps the halves of what is turned, with a minus: a product with zeros and ones is exact, and knows no fixed
    number of tokens, as XNNPACK's slices do.
    """
    swap = np.zeros((x.dims[-1], x.dims[-1]), np.float32)
    first, second = np.arange(half), np.arange(half, 2 * half)
    swap[first, second], swap[second, first] = -1, 1
    cos, sin = turn
    return d.add(d.multiply(x, cos), d.multiply(d.linear(x, swap), sin))


def _times(d: Delegate, x: Value, product: OnlineProduct) -> Value:
    """x M along the last axis, M the Kronecker product of the factors, once for each part of x of their size."""
    sizes = [factor.shape[0] for factor in product.factors]
    if sizes == [x.dims[-1]]:
        return d.linear(x, _matrix(product.factors[0]))
    rows = math.prod(x.dims[:-1]) * (x.dims[-1] // math.prod(sizes))
    folded = d.reshape(x, (rows, *sizes), tokens=0)
    last = len(sizes)
    for axis, factor in enumerate(product.factors, start=1):
        order = [*range(axis), *range(axis + 1, last + 1), axis]
        back = [int(place) for place in np.argsort(order)]
        if axis == last:
            folded = d.linear(folded, _matrix(factor))
        else:
            folded = d.transpose(d.linear(d.transpose(folded, order), _matrix(factor)), back)
    return d.reshape(folded, x.dims, tokens=1)


def _matrix(factor: Tensor) -> np.ndarray:
    """A factor as the weight of a linear, which multiplies by its transpose."""
    return np.ascontiguousarray(factor.numpy().astype(np.float32).T)
