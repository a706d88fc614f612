"""The `fused` form: ONNX Runtime's own operators, as its official client for language models expects them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from boa_edge.progress import track
from exporters.onnx.decoder import FLOAT, INT64, DecoderBuilder
from exporters.onnx.embedding import float_embedding, tied_embedding, tied_float_head
from exporters.onnx.gqa import Lengths, Tables, group_query_attention, lengths, tables
from exporters.onnx.graph import scope
from exporters.onnx.kernels import Carrier, carrier
from exporters.onnx.linears import add_bias, float_linear, quantized_linear, store
from exporters.onnx.nbits import as_table, nbits_embedding, nbits_linear, store_nbits
from exporters.onnx.rope import Rotation, rotate, rotation
from exporters.onnx.session import ALL_LOGITS, LOGITS_START
from toolchain.families import LayerNames
from toolchain.quantized import QuantizedWeight

_END = 2**63 - 1


@dataclass
class _Residual:
    """The residual stream: `value`, to which `pending` is to be added by the norm that comes next."""

    value: ir.Value
    pending: ir.Value | None = None


@dataclass
class FusedDecoder(DecoderBuilder):
    """Writes q, k and v as one matrix, attention with its rotary embedding and cache as one node, each sum of the
    residual stream with the norm behind it as one node, and the logits of the last position unless asked for more.
    """

    def build(self) -> None:
        g, spec = self.g, self.checkpoint.spec
        input_ids = g.input("input_ids", INT64, ["batch", "sequence"])
        attention_mask = g.input("attention_mask", INT64, ["batch", "total"])
        cache: list[int | str] = ["batch", spec.kv_heads, "past", spec.head_dim]
        pasts = self.cache_inputs(cache)
        start = g.optional_input(LOGITS_START, [_END])
        at = lengths(g, attention_mask)
        turn = self._turn(input_ids, at)
        x, head = self._embedding(input_ids)
        x = self.online.at(x, spec.embedding, "output", spec.hidden_size, scope(spec.embedding))
        residual = _Residual(x)
        presents = []
        for names, past in track(list(zip(spec.layer_names, pasts, strict=True)), "writing layers"):
            presents.append(self._layer(residual, names, at, turn, past))
        x = self._last_norm(residual)
        self._logits(x, start, head)
        self.cache_outputs(presents, ["batch", spec.kv_heads, "present", spec.head_dim])

    def _logits(self, x: ir.Value, start: ir.Value, head: Callable[[ir.Value], ir.Value]) -> None:
        """The last position's logits, and those from `start` on, by one head that packs its weights once.

        An output of its own for the former, since the official client makes room for as many positions as tokens unless
        the graph says that there is one.
        """
        g, spec = self.g, self.checkpoint.spec
        path = f"{scope(spec.head)}/rows"
        end, axis, last = (g.constant([value], INT64) for value in (_END, 1, -1))
        asked = g.op("Slice", [x, start, end, axis], f"{path}/asked/Slice")
        final = g.op("Slice", [x, last, end, axis], f"{path}/last/Slice")
        y = head(g.op("Concat", [asked, final], f"{path}/Concat", axis=1))
        first = g.constant([0], INT64)
        logits = g.op("Slice", [y, last, end, axis], f"{path}/logits/Slice")
        g.output(logits, "logits", FLOAT, ["batch", 1, spec.vocab_size])
        every = g.op("Slice", [y, first, last, axis], f"{path}/{ALL_LOGITS}/Slice")
        g.output(every, ALL_LOGITS, FLOAT, ["batch", "positions", spec.vocab_size])

    def _turn(self, input_ids: ir.Value, at: Lengths) -> Tables | Rotation:
        """Tables for attention; or, where q and k owe a product after they are turned, cos and sin outside of it."""
        g, spec = self.g, self.checkpoint.spec
        if not self.online.any("query_key"):
            return tables(g, spec.attention[0], spec.max_positions, "/rope")
        size = g.op("Shape", [input_ids], "/rope/Shape")
        count = g.op("Gather", [size, g.constant(1, INT64)], "/rope/Gather")
        total = g.op("Cast", [at.total], "/rope/total/Cast", to=int(INT64))
        past = g.op("Sub", [total, count], "/rope/Sub")
        positions = g.op("Range", [past, total, g.constant(1, INT64)], "/rope/Range")
        return rotation(g, g.op("Expand", [positions, size], "/rope/Expand"), spec)

    def _layer(
        self,
        residual: _Residual,
        names: LayerNames,
        at: Lengths,
        turn: Tables | Rotation,
        past: tuple[ir.Value, ir.Value],
    ) -> tuple[ir.Value, ir.Value]:
        g, spec = self.g, self.checkpoint.spec
        h = self._norm(residual, names.attention_norm)
        attention = scope(names.q).rpartition("/")[0]
        if isinstance(turn, Tables):
            projected = self._projections(h, names)
            context, *present = group_query_attention(g, projected, past, at, turn, spec, attention)
        else:
            q, k, v = (self._linear(h, name) for name in (names.q, names.k, names.v))
            q, k = self.turned(q, names.q, spec.heads, turn), self.turned(k, names.k, spec.kv_heads, turn)
            context, *present = group_query_attention(g, (q, k, v), past, at, None, spec, attention)
        residual.pending = self._linear(context, names.o)
        h = self._norm(residual, names.mlp_norm)
        assert names.gate is not None
        gate, up = self._linear(h, names.gate), self._linear(h, names.up)
        path = scope(names.gate).rpartition("/")[0]
        gate = g.contrib("QuickGelu", [gate], f"{path}/silu/QuickGelu", alpha=1.0)
        product = g.op("Mul", [gate, up], f"{path}/Mul")
        product = self.online.at(product, names.down, "input", spec.intermediate_size, scope(names.down))
        residual.pending = self._linear(product, names.down)
        return present[0], present[1]

    def turned(self, x: ir.Value, module: str, heads: int, turn: Rotation) -> ir.Value:
        """q or k float32 [batch, sequence, heads * head_dim], turned by its positions and then by what it owes."""
        x = rotate(self.g, x, turn, heads, scope(module))
        attention = module.rpartition(".")[0]
        return self.online.at(x, attention, "query_key", heads * self.checkpoint.spec.head_dim, scope(module))

    def _norm(self, residual: _Residual, module: str) -> ir.Value:
        if residual.pending is None:
            return self.norm(residual.value, module)
        scale = self.g.floats(f"{module}.weight", self.parameter(f"{module}.weight"))
        normed, residual.value = self.g.contribs(
            "SkipSimplifiedLayerNormalization",
            [residual.value, residual.pending, scale],
            f"{scope(module)}/SkipSimplifiedLayerNormalization",
            (0, 3),
            epsilon=self.checkpoint.spec.norm_eps,
        )
        residual.pending = None
        return normed

    def _last_norm(self, residual: _Residual) -> ir.Value:
        g, spec = self.g, self.checkpoint.spec
        if not self.online.any("input", spec.final_norm):
            return self._norm(residual, spec.final_norm)
        assert residual.pending is not None
        x = g.op("Add", [residual.value, residual.pending], f"{scope(spec.final_norm)}/residual/Add")
        x = self.online.at(x, spec.final_norm, "input", spec.hidden_size, scope(spec.final_norm))
        return self.norm(x, spec.final_norm)

    def _projections(self, h: ir.Value, names: LayerNames) -> tuple[ir.Value] | tuple[ir.Value, ir.Value, ir.Value]:
        """q, k and v, side by side in one tensor where they have the same grid and precision."""
        modules = (names.q, names.k, names.v)
        if not all(self.checkpoint.is_quantized(module) for module in modules):
            return self._linear(h, names.q), self._linear(h, names.k), self._linear(h, names.v)
        weights = [self.checkpoint.quantized(module) for module in modules]
        grids = {(each.group_size, each.zero_points is None) for each in weights}
        ways = {self._carrier(module, weight) for module, weight in zip(modules, weights, strict=True)}
        precisions = {self.precision(module) for module in modules}
        if len(grids) > 1 or len(ways) > 1 or len(precisions) > 1 or not next(iter(ways)).fused:
            return self._linear(h, names.q), self._linear(h, names.k), self._linear(h, names.v)
        way = next(iter(ways))
        name = f"{names.q.rpartition('.')[0]}.qkv_proj"
        self.linears.update(dict.fromkeys(modules, way))
        stored = store_nbits(self.g, name, weights, way.dtype.bitwidth)
        bias = self.bias(name, modules)
        return (nbits_linear(self.g, h, scope(name), stored, self.precision(names.q), bias),)

    def _linear(self, x: ir.Value, module: str) -> ir.Value:
        g = self.g
        bias = self.bias(module, (module,))
        if not self.checkpoint.is_quantized(module):
            y = float_linear(g, x, module, self.parameter(f"{module}.weight"))
            return y if bias is None else add_bias(g, y, module, bias)
        weight = self.checkpoint.quantized(module)
        way = self.linears[module] = self._carrier(module, weight)
        if way.fused:
            stored = store_nbits(g, module, [weight], way.dtype.bitwidth)
            return nbits_linear(g, x, scope(module), stored, self.precision(module), bias)
        y = quantized_linear(g, x, module, store(g, module, weight, way))
        return y if bias is None else add_bias(g, y, module, bias)

    def _carrier(self, module: str, weight: QuantizedWeight) -> Carrier:
        return carrier(weight.bits, weight.group_size, self.precision(module))

    def _embedding(self, ids: ir.Value) -> tuple[ir.Value, Callable[[ir.Value], ir.Value]]:
        """The embedded tokens, and the function that later turns the last hidden state into logits."""
        g, checkpoint, spec = self.g, self.checkpoint, self.checkpoint.spec
        module, path = spec.embedding, scope(spec.embedding)
        if not checkpoint.is_quantized(module):
            x, source = float_embedding(g, ids, module, self.parameter(f"{module}.weight"))
            if spec.tied_embeddings:
                return x, lambda x: tied_float_head(g, x, spec.head, source)
            return x, lambda x: self._linear(x, spec.head)
        table = checkpoint.quantized(module)
        if not spec.tied_embeddings:
            # No product is computed with it, so it takes the fewest bits that a byte divides into.
            bits = {3: 4}.get(table.bits, table.bits)
            return nbits_embedding(g, ids, path, store_nbits(g, module, [table], bits, table=True)), (
                lambda x: self._linear(x, spec.head)
            )
        way = self.linears[spec.head] = self._carrier(spec.head, table)
        if not way.fused:
            plain = store(g, spec.head, table, way)
            return tied_embedding(g, ids, module, plain), lambda x: quantized_linear(g, x, spec.head, plain)
        stored = store_nbits(g, spec.head, [table], way.dtype.bitwidth)
        x = nbits_embedding(g, ids, path, as_table(g, module, stored))
        return x, lambda x: nbits_linear(g, x, scope(spec.head), stored, self.precision(spec.head))
